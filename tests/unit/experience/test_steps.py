"""The log of decisions reads back as what was decided."""

from __future__ import annotations

import pytest

from rlhf_dist.errors import RunError
from rlhf_dist.experience import steps
from rlhf_dist.experience.steps import LearnerStep, StepHistory, StepsLog, read_history
from rlhf_dist.types import BatchPlace, BatchRows, SampleInfo

SELECTION = (BatchRows(BatchPlace("s-000001", 0), (0, 2)), BatchRows(BatchPlace("s-000002", 5), (1,)))


@pytest.fixture
def log(tmp_path):
    log = StepsLog(tmp_path)
    log.append([steps.started_record(samples_per_prompt=1, max_staleness=2)])
    log.append([steps.leased_record(4, [7, 8, 9], SELECTION, 3)])
    return log


def test_an_empty_folder_has_no_history(tmp_path):
    assert read_history(tmp_path) == StepHistory()


def test_a_leased_step_is_not_trained_until_that_is_said(log, tmp_path):
    leased = LearnerStep(4, (7, 8, 9), SELECTION, oldest_version=3, max_staleness=2)
    history = read_history(tmp_path)
    assert history.steps == {4: leased}
    assert history.samples_per_prompt == 1
    log.append([steps.trained_record(4, "abc")])
    step = read_history(tmp_path).steps[4]
    assert (step.trained, step.policy_digest) == (True, "abc")


def test_a_step_keeps_the_limit_that_it_was_leased_under(log, tmp_path):
    log.append([steps.started_record(samples_per_prompt=1, max_staleness=0)])
    log.append([steps.leased_record(5, [10], [], 5)])
    assert {step.step: step.max_staleness for step in read_history(tmp_path).steps.values()} == {4: 2, 5: 0}


def test_drops_are_counted_by_reason_and_failures_kept(log, tmp_path):
    log.append(
        [
            steps.dropped_record("stale", [SampleInfo(7, 0, 1, 0, 0, 9), SampleInfo(7, 1, 1, 0, 0, 9)]),
            steps.dropped_record("duplicate", [SampleInfo(8, 0, 0, 0, 0, 9)]),
            steps.dropped_record("stale", [SampleInfo(9, 0, 0, 0, 0, 9)]),
            steps.failed_record(9, ["too long", "worker lost"]),
            {"event": "served", "worker": "rollout worker 0", "version": 3, "max_abs_difference": 1e-6},
        ]
    )
    history = read_history(tmp_path)
    assert history.dropped == {"stale": 3, "duplicate": 1}
    assert history.stale == {(7, 0, 1), (7, 1, 1), (9, 0, 0)}
    assert history.failed == {9: ["too long", "worker lost"]}
    assert [record["version"] for record in history.served] == [3]


@pytest.mark.parametrize(
    "record", [{"event": "trained", "step": 9, "policy_digest": None}, {"event": "leased"}, {"step": 4}]
)
def test_a_record_that_lacks_something_is_one_message(record, log, tmp_path):
    log.append([record])
    with pytest.raises(RunError, match=r"steps\.jsonl has a record that is none \(line 3, KeyError: "):
        read_history(tmp_path)
