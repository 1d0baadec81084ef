"""A scoring worker: what it scored is in the journal, what it could not is in its report."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest

from rlhf_dist.cluster.scoring_worker import ScoringWorker
from rlhf_dist.engines.settings import ScoringSettings
from rlhf_dist.errors import RunError
from rlhf_dist.experience.journal import JournalReader
from rlhf_dist.experience.schema import rollout_batch
from rlhf_dist.rewards.settings import FunctionRewardSettings
from rlhf_dist.types import BatchPlace, Completion, FailedSample, GenerationRequest, SampleInfo, VersionSpan

REWARDS = """
def length(prompts, responses, columns):
    return [float("nan") if "7" in response else len(response) for response in responses]
"""
REASON = "reward function 'length_rewards:length' returned nan; scores must be finite, in float32"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "length_rewards.py").write_text(REWARDS)
    worker = ScoringWorker(
        "scoring worker 0",
        ScoringSettings(),
        (FunctionRewardSettings(path="length_rewards:length"),),
        reference_model=None,
        policy_model="none is needed",
        journal=tmp_path / "journal",
        segment_bytes=1 << 30,
    )
    worker.start()
    yield worker
    sys.modules.pop("length_rewards")


def rollouts(*ordinals):
    """One sample of each prompt, the second attempt at it; the response is its ordinal."""
    prompts = pa.table({"prompt": ["p"], "columns": ["{}"]})
    completions = []
    for ordinal in ordinals:
        request = GenerationRequest(ordinal, 1, 0, 5, [1, 2], 1_000_000, attempt=1)
        spans = (VersionSpan(3, 0, 1),)
        completions.append(Completion(request, f"{ordinal}", [9], [-1.0], spans, "stop", 2_000_000))
    return rollout_batch(completions, producer="rollout worker 0", prompts=prompts)


def journal(tmp_path):
    return [batch["ordinal"].to_pylist() for _, batch in JournalReader(tmp_path / "journal").batches()]


def test_the_good_samples_are_in_the_journal_and_the_others_in_the_report(worker, tmp_path):
    scored, report = worker.score(rollouts(5, 7, 100), 1.0)
    assert scored["ordinal"].to_pylist() == [5, 100]
    assert report.failed == (FailedSample(row=1, ordinal=7, sample=1, attempt=1, reason=REASON),)
    assert report.info.samples == (SampleInfo(5, 1, 1, 3, 3, 1), SampleInfo(100, 1, 1, 3, 3, 1))
    assert report.info.place == BatchPlace("scoring-worker-0-000001", 0)
    assert journal(tmp_path) == [[5, 100]]


def test_only_the_rows_that_are_asked_for_are_scored(worker, tmp_path):
    scored, report = worker.score(rollouts(5, 6, 7, 100), 1.0, rows=(2, 3))
    assert scored["ordinal"].to_pylist() == [100]
    assert [(failed.row, failed.ordinal) for failed in report.failed] == [(2, 7)]
    assert journal(tmp_path) == [[100]]


def test_where_nothing_can_be_scored_nothing_is_written(worker, tmp_path):
    scored, report = worker.score(rollouts(7, 5, 77), 1.0, rows=(0, 2))
    assert (scored, report.info) == (None, None)
    assert [(failed.row, failed.ordinal) for failed in report.failed] == [(0, 7), (2, 77)]
    assert journal(tmp_path) == []


def test_a_journal_that_cannot_be_written_is_no_samples_failure(worker, tmp_path):
    (tmp_path / "journal").write_text("in its place")
    with pytest.raises(RunError, match=r"journal .* cannot be written"):
        worker.score(rollouts(5), 1.0)
