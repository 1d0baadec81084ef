"""What is said of a journal, of good ones and of such as must not be."""

from __future__ import annotations

import io
import json
import signal
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rlhf_dist.cli import app
from rlhf_dist.experience import steps
from rlhf_dist.experience.compaction import compact
from rlhf_dist.experience.dead_letter import DeadLetters
from rlhf_dist.experience.inspection import ServedVersion, inspect_run, print_inspection
from rlhf_dist.experience.journal import JOURNAL_FOLDER, JournalReader, JournalWriter
from rlhf_dist.experience.ordinals import Ordinals
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.types import BatchRows


class RunOnDisk:
    """Writes a journal a step at a time, however wrong."""

    def __init__(self, root, make_batch):
        self.root, self.folder, self._make_batch = root, root / JOURNAL_FOLDER, make_batch
        self._writer = JournalWriter(self.folder, "scorer", max_segment_bytes=1)
        self.log = StepsLog(self.folder)
        self.log.append([steps.started_record(samples_per_prompt=2, max_staleness=1)])

    def step(self, step, *samples, trained=True):
        """Of (ordinal, sample, version)."""
        place = self._writer.append(self._make_batch(samples))
        ordinals = sorted({ordinal for ordinal, _, _ in samples})
        selection = [BatchRows(place, tuple(range(len(samples))))]
        self.log.append([steps.leased_record(step, ordinals, selection, min(s[2] for s in samples))])
        if trained:
            self.log.append([steps.trained_record(step, None)])

    def inspect(self):
        return inspect_run(self.root)


@pytest.fixture
def run(tmp_path, completion, scored):
    def make_batch(samples):
        return scored([completion(o, s, version=version) for o, s, version in samples])

    return RunOnDisk(tmp_path / "run", make_batch)


def test_the_numbers_of_a_good_run(run):
    run.step(0, (0, 0, 0), (0, 1, 0), (2, 0, 0), (2, 1, 0))
    run.step(1, (4, 0, 0), (4, 1, 1))
    run.step(2, (5, 0, 2), (5, 1, 2), trained=False)
    run.log.append(
        [
            steps.failed_record(3, ["w was lost", "w was lost"]),
            steps.dropped_record("duplicate", []),
            {"event": "served", "worker": "a", "version": 1, "max_abs_difference": 1e-6},
            {"event": "served", "worker": "b", "version": 1, "max_abs_difference": 3e-6},
        ]
    )
    found = run.inspect()
    assert (found.num_steps_trained, found.num_steps_leased, found.num_ordinals_trained) == (2, 1, 3)
    assert found.missing == [1]
    assert found.failed == {3: ["w was lost", "w was lost"]}
    assert found.samples_by_version == {0: 5, 1: 1}
    assert (found.staleness_max, found.max_staleness) == (1, 1)
    assert found.staleness_mean == pytest.approx(1 / 6)
    assert found.served == [ServedVersion(1, 2, 3e-6)]
    assert (found.num_segments, found.num_archives, found.torn_bytes) == (3, 0, {})
    assert found.num_bytes == JournalReader(run.folder).num_bytes() > 0
    assert found.violations == []


def test_a_prompt_that_was_given_up_is_not_missing_and_its_letter_is_named(run, prompts):
    run.step(0, (0, 0, 0), (0, 1, 0), (2, 0, 0), (2, 1, 0))
    assert run.inspect().dead_letters is None
    letters = DeadLetters(run.folder)
    letters.append(1, ("no colour",), row=1, prompts=prompts)
    run.log.append([steps.failed_record(1, ["no colour"])])
    found = run.inspect()
    assert (found.missing, found.failed) == ([], {1: ["no colour"]})
    assert found.dead_letters == str(run.folder / "dead-letter.jsonl")
    output = io.StringIO()
    print_inspection(Console(width=300, file=output), found)
    line = next(line for line in output.getvalue().splitlines() if line.startswith("failed"))
    assert line.rstrip().endswith(f"1: 1 (why: {found.dead_letters})")


def test_a_sample_that_was_trained_twice_is_a_violation(run):
    run.step(0, (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0))
    run.step(1, (1, 0, 0), (1, 1, 0))
    found = run.inspect()
    assert found.doubled == [1]
    assert found.violations == ["trained more than once: 1: 1"]


def test_a_sample_twice_in_one_step_is_a_violation(run):
    run.step(0, (0, 0, 0), (0, 0, 0))
    assert run.inspect().doubled == [0]


def test_the_same_step_trained_again_is_none(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    run.log.append([steps.trained_record(0, None)])
    assert run.inspect().doubled == []


def test_a_sample_that_was_too_old_is_a_violation_whatever_the_log_says(run):
    for step in range(3):
        run.step(step, (step, 0, step), (step, 1, step))
    run.step(3, (3, 0, 2), (3, 1, 3))
    assert run.inspect().violations == []
    run.step(4, (4, 0, 2), (4, 1, 4))
    assert (run.inspect().staleness_max, run.inspect().stale_steps) == (2, [4])
    log = run.folder / "steps.jsonl"
    log.write_text(log.read_text().replace('"oldest_version": 2', '"oldest_version": 4'))
    assert run.inspect().violations == ["steps with samples older than their limit: 1: 4"]


def test_what_was_deleted_is_known_from_the_log(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    run.step(1, (1, 0, 0), (1, 1, 1))
    run.step(2, (0, 0, 2), (2, 0, 2))
    history = steps.read_history(run.folder)
    done = Ordinals(ordinal for step in (0, 1) for ordinal in history.steps[step].ordinals)
    compact(run.folder, done, archive_bytes=1)
    archived = run.inspect()
    assert (archived.num_archives, archived.samples_by_version) == (2, {0: 3, 1: 1, 2: 2})
    compact(run.folder, done, max_bytes=1)
    found = run.inspect()
    assert (found.num_archives, found.samples_by_version) == (0, {2: 2})
    assert (found.staleness_max, found.doubled, found.num_ordinals_trained) == (1, [0], 3)


def test_what_was_deleted_to_save_room_is_no_violation(run):
    for step in range(3):
        run.step(step, (step, 0, step), (step, 1, step))
    compact(run.folder, Ordinals([0]), archive_bytes=1, max_bytes=1)
    found = run.inspect()
    assert (found.num_steps_deleted, found.lost_steps, found.violations) == (1, [], [])


@pytest.mark.parametrize("trained", [True, False])
def test_samples_that_a_step_has_lost_are_a_violation(trained, run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    run.step(1, (1, 0, 1), (1, 1, 1), trained=trained)
    path = run.folder / "scorer-000002.arrows"
    path.write_bytes(path.read_bytes()[:-100])
    found = run.inspect()
    assert found.violations == [
        "steps whose samples the journal has lost: 1: 1",
        "no longer as they were written: 1: scorer-000002 batch 0",
    ]
    assert found.torn_bytes == {}, "a step had it, so it was whole"
    path.unlink()
    assert run.inspect().violations == ["steps whose samples the journal has lost: 1: 1"]


def test_steps_that_the_log_has_lost_are_a_violation(run):
    for step in (0, 1, 3):
        run.step(step, (step, 0, step), (step, 1, step))
    assert run.inspect().violations == ["steps that steps.jsonl has lost: 1: 2"]


def test_steps_that_are_done_by_other_files_and_not_by_the_log_are_a_violation(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    run.step(1, (1, 0, 0), (1, 1, 0), trained=False)
    assert inspect_run(run.root, reported=[0]).violations == []
    assert inspect_run(run.root, reported=[0, 1, 2]).violations == [
        "steps that steps.jsonl has lost: 2: 1, 2"
    ]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_only_a_synchronous_run_may_not_pass_a_prompt_over(max_staleness, run):
    run.log.append([steps.started_record(samples_per_prompt=2, max_staleness=max_staleness)])
    run.step(0, (0, 0, 0), (0, 1, 0), (2, 0, 0), (2, 1, 0))
    violation = "passed over, though training was synchronous: 1: 1"
    assert run.inspect().violations == ([violation] if max_staleness == 0 else [])


def test_bytes_that_changed_are_a_violation(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    path = run.folder / "scorer-000001.arrows"
    path.write_bytes(path.read_bytes().replace(b"response 0.1", b"response 9.1"))
    assert run.inspect().violations == [
        "steps whose samples the journal has lost: 1: 0",
        "no longer as they were written: 1: scorer-000001 batch 0",
    ]


def test_samples_without_a_log_are_a_violation(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    (run.folder / "steps.jsonl").unlink()
    assert run.inspect().violations == [
        "there are samples and no steps.jsonl, which says what became of them"
    ]


def test_torn_ends_are_named(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    path = run.folder / "scorer-000001.arrows"
    path.write_bytes(path.read_bytes() + b"\x07" * 5)
    for name, line in (("steps.jsonl", b'{"event": "tra'), ("dead-letter.jsonl", b'{"ord')):
        with (run.folder / name).open("ab") as file:
            file.write(line)
    torn = run.inspect().torn_bytes
    assert torn == {"scorer-000001": 13, "steps.jsonl": 14, "dead-letter.jsonl": 5}, "no end any more"


def test_an_empty_journal_has_no_numbers(tmp_path):
    (tmp_path / JOURNAL_FOLDER).mkdir()
    found = inspect_run(tmp_path)
    assert (found.num_steps_trained, found.staleness_max, found.staleness_mean) == (0, None, None)
    assert found.violations == []


def test_many_numbers_are_shortened_for_a_person(run):
    run.step(0, (50, 0, 0), (50, 1, 0))
    output = io.StringIO()
    print_inspection(Console(width=200, file=output), run.inspect())
    assert "50: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, …" in output.getvalue()


# ----------------------------------------------------------------------------------------- command line


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch):
    """A command changes the import path and the handler of SIGTERM of its process, which here is ours."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def invoke(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_prints_the_numbers_and_ends_with_0(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    result = invoke(run.root)
    assert result.exit_code == 0, result.output
    assert "prompts trained" in result.output
    assert "at most 0 steps behind, mean 0.00 (limit 1)" in result.output


def test_the_command_prints_the_same_as_json(run):
    run.step(0, (0, 0, 0), (0, 1, 0))
    found = json.loads(invoke(run.root, "--json").output)
    assert found == json.loads(json.dumps(run.inspect().as_json()))
    assert found["samples_by_version"] == {"0": 2}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_ends_with_1_if_something_must_not_be(run, options):
    run.step(0, (0, 0, 0), (0, 0, 0))
    result = invoke(run.root, *options)
    assert result.exit_code == 1
    assert "trained more than once: 1: 0" in result.output


def test_a_folder_without_a_journal_is_one_message(tmp_path):
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert "has no folder 'journal'; name the folder of a run (run.dir)" in result.stderr
