"""Where a run goes on: damaged checkpoints are passed over, and without any the journal must reach back."""

from __future__ import annotations

import os
import shutil

import pyarrow as pa
import pytest

from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.driver.starting_point import (
    StartingPoint,
    newest_whole_checkpoint,
    reported_steps,
    starting_point,
)
from rlhf_dist.errors import ConfigError, RunError
from rlhf_dist.experience import steps
from rlhf_dist.experience.journal import JournalWriter
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.types import BatchRows


@pytest.fixture
def folder(tmp_path):
    """A run whose journal has steps 0 to 6, the samples of each in a segment of its own."""
    folder = RunFolder(tmp_path)
    log = StepsLog(folder.journal)
    writer = JournalWriter(folder.journal, "w", max_segment_bytes=1)
    for step in range(7):
        place = writer.append(pa.RecordBatch.from_pylist([], EXPERIENCE_SCHEMA))
        rows = [BatchRows(place, ())]
        log.append([steps.leased_record(step, [2 * step, 2 * step + 1], rows, step)])
        log.append([steps.trained_record(step, f"digest {step}")])
    log.close()
    return folder


def segment_of(step, folder):
    """The file with a step's samples."""
    return folder.journal / f"w-{step + 1:06d}.arrows"


def damage(checkpoint):
    os.truncate(checkpoint / "algorithm.pt", 1)


@pytest.mark.parametrize(
    ("damaged", "at_most", "found"),
    [
        ((), None, 6),
        ((6,), None, 4),
        ((6, 4), None, 2),
        ((4,), None, 6),
        ((6, 4, 2), None, None),
        ((), 5, 4),
        ((4,), 5, 2),
        ((6,), 5, 4),
        ((), 1, None),
    ],
)
def test_the_newest_whole_checkpoint_and_the_damaged_ones_after_it(damaged, at_most, found, tmp_path, save):
    paths = {step: save(tmp_path, step, keep_last=9) for step in (2, 4, 6)}
    for step in damaged:
        damage(paths[step])
    checkpoint, passed = newest_whole_checkpoint(tmp_path, at_most=at_most)
    assert checkpoint == (found and paths[found])
    newer = [step for step in (6, 4, 2) if (found or 0) < step <= (at_most or 6)]
    assert [each.checkpoint for each in passed] == [paths[step] for step in newer]
    for each in passed:
        assert str(each) == (
            f"checkpoint {each.checkpoint} is damaged (algorithm.pt has 1 of 5 bytes) and is passed over"
        )


def test_only_who_asks_gets_the_best_one(tmp_path, save):
    for step, score in [(2, 0.9), (4, 0.1), (6, 0.2)]:
        save(tmp_path, step, score=score, keep_last=1)
    assert newest_whole_checkpoint(tmp_path, at_most=5)[0] is None
    assert newest_whole_checkpoint(tmp_path, at_most=5, with_best=True)[0].name == "best-000002"
    save(tmp_path, 7, score=1.0)
    assert newest_whole_checkpoint(tmp_path, with_best=True)[0].name == "step-000007"


def test_a_run_goes_on_from_its_newest_checkpoint(folder, save, config):
    assert starting_point(folder, config()) == StartingPoint(None, 0, ())
    for step in (2, 4):
        path = save(folder.checkpoints, step)
    assert starting_point(folder, config()) == StartingPoint(path, 4, ())


def test_a_damaged_checkpoint_is_passed_over_and_named(folder, save, config):
    before, newest = (save(folder.checkpoints, step) for step in (2, 4))
    damage(newest)
    start = starting_point(folder, config())
    assert (start.checkpoint, start.first_step) == (before, 2)
    (note,) = start.notes
    assert note == f"checkpoint {newest} is damaged (algorithm.pt has 1 of 5 bytes) and is passed over"


def test_another_cut_is_said(folder, save, config):
    save(folder.checkpoints, 4)
    (note,) = starting_point(folder, config(learner={"num_workers": 1, "zero_stage": 3})).notes
    assert note.startswith(
        "checkpoint step-000004 was written by 2 learner rank(s) with ZeRO stage 2, and 1 "
    )


def test_another_algorithm_is_refused(folder, save, config):
    save(folder.checkpoints, 4)
    with pytest.raises(ConfigError, match=r"was written by algorithm\.name=ppo"):
        starting_point(folder, config(algorithm={"name": "reinforce"}))


@pytest.mark.parametrize("num_steps", [4, 5])
def test_a_run_may_end_where_its_checkpoint_is_or_later(num_steps, folder, save, config):
    save(folder.checkpoints, 4)
    assert starting_point(folder, config(run={"dir": "runs/x", "num_steps": num_steps})).first_step == 4


def test_a_run_that_is_to_end_before_its_checkpoint_is_refused(folder, save, config):
    checkpoint = save(folder.checkpoints, 4)
    with pytest.raises(ConfigError) as caught:
        starting_point(folder, config(run={"dir": "runs/x", "num_steps": 3}))
    assert str(caught.value) == (
        f"run.num_steps=3 is below the 4 steps that checkpoint {checkpoint} has behind it; set "
        "run.num_steps=4 or more, or set run.dir to a new folder"
    )


def test_without_a_whole_checkpoint_all_steps_are_done_again(folder, save, config):
    damage(save(folder.checkpoints, 4))
    start = starting_point(folder, config())
    assert (start.checkpoint, start.first_step) == (None, 0)
    assert start.notes[-1] == "no checkpoint is whole: all steps are done again, from the journal"


@pytest.mark.parametrize("gone", [0, 3, 6])
def test_without_a_whole_checkpoint_or_a_whole_journal_the_run_cannot_go_on(gone, folder, save, config):
    damage(save(folder.checkpoints, 4))
    segment_of(gone, folder).unlink()
    with pytest.raises(RunError) as caught:
        starting_point(folder, config())
    assert str(caught.value) == (
        f"no checkpoint in {folder.checkpoints} is whole (step-000004: algorithm.pt has 1 of 5 bytes), and "
        f"the journal no longer has the samples of step {gone}, so that the run cannot start again from it; "
        "bring the files back from a copy, or start anew with --overwrite"
    )


@pytest.mark.parametrize("journal", ["deleted", "empty", "of another run", "not trained"])
def test_a_checkpoint_without_the_record_of_the_steps_before_is_refused(journal, folder, save, config):
    path = save(folder.checkpoints, 4)
    log = folder.journal / "steps.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    kept = {"deleted": [], "empty": [], "of another run": lines[:6], "not trained": lines[:7]}[journal]
    log.write_text("".join(kept))
    if journal == "deleted":
        shutil.rmtree(folder.journal)
    with pytest.raises(RunError) as caught:
        starting_point(folder, config())
    step = 3 if kept else 0
    assert str(caught.value) == (
        f"checkpoint {path} goes on with step 4, but {log} does not say that step {step} was trained: the "
        "journal was deleted, or is not that of this run; bring it back from a copy, or start anew with "
        "--overwrite"
    )


def test_later_steps_and_missing_segments_of_earlier_ones_do_not_matter(folder, save, config):
    path = save(folder.checkpoints, 4)
    for step in range(4):
        segment_of(step, folder).unlink()
    assert starting_point(folder, config()) == StartingPoint(path, 4, ())


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("harm", ["changed", "cut short", "deleted"])
def test_samples_that_a_step_is_repeated_with_have_to_be_whole(harm, step, folder, save, config):
    save(folder.checkpoints, 4)
    path = segment_of(step, folder)
    content = path.read_bytes()
    match harm:
        case "changed":
            path.write_bytes(content[:-9] + b"\1" + content[-8:])
        case "cut short":
            path.write_bytes(content[:-50])
        case "deleted":
            path.unlink()
    with pytest.raises(RunError) as caught:
        starting_point(folder, config())
    message = str(caught.value)
    assert message.startswith(f"the samples of step {step}, which the run goes on with, are not all there: ")
    assert message.endswith(f"bring {folder.journal} back from a copy, or start anew with --overwrite")
    assert path.stem in message


def test_steps_are_reported_by_metrics_and_by_checkpoints(folder, save):
    assert reported_steps(folder) == set()
    folder.metrics.write_text('{"step": 1}\n{"step": 5}\n')
    assert reported_steps(folder) == {1, 5}
    save(folder.checkpoints, 3)
    assert reported_steps(folder) == {0, 1, 2, 5}


@pytest.fixture
def with_best(folder, save):
    """The best one is of step 2; the last one, of step 6, is damaged, and there is no other."""
    for step, score in [(2, 0.9), (4, 0.1), (6, 0.2)]:
        path = save(folder.checkpoints, step, score=score, keep_last=1)
    damage(path)
    return folder


def test_the_best_one_is_gone_on_from_where_the_last_one_is_damaged(with_best, config):
    segment_of(1, with_best).unlink()
    start = starting_point(with_best, config())
    assert (start.checkpoint, start.first_step) == (with_best.checkpoints / "step-000002", 2)
    assert (
        start.notes[-1] == "the copy of the best checkpoint, best-000002, is whole: the run goes on from it"
    )
    found, _ = newest_whole_checkpoint(with_best.checkpoints, at_most=2)
    assert found == start.checkpoint, "the learner finds it as every other"
    assert (with_best.checkpoints / "best-000002").is_dir()
    again = starting_point(with_best, config())
    assert (again.checkpoint, again.first_step) == (start.checkpoint, 2)


@pytest.mark.parametrize("gone", [2, 5])
def test_the_best_one_is_of_no_use_without_the_steps_since(gone, with_best, config):
    segment_of(gone, with_best).unlink()
    with pytest.raises(RunError, match=f"the journal no longer has the samples of step {gone}"):
        starting_point(with_best, config())
    assert not (with_best.checkpoints / "step-000002").exists()


def test_the_newer_one_of_the_best_and_the_one_before_is_taken(folder, save, config):
    for step, score in [(2, 0.1), (3, 0.1), (4, 0.9), (5, 0.2), (6, 0.2)]:
        path = save(folder.checkpoints, step, score=score, keep_last=2)
    damage(path)
    assert starting_point(folder, config()).first_step == 5
    damage(folder.checkpoints / "step-000005")
    assert starting_point(folder, config()).first_step == 4


def test_the_best_one_of_a_time_that_the_run_went_back_before_is_not_gone_on_from(folder, save, config):
    save(folder.checkpoints, 6, score=0.9)
    path = save(folder.checkpoints, 4, score=0.1, keep_last=1)
    assert starting_point(folder, config()) == StartingPoint(path, 4, ())
