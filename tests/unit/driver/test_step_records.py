"""What is kept of steps, with a learner that writes a few bytes and a queue that notes what it is asked."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from rlhf_dist.driver.checkpoint import list_checkpoints
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.driver.step_records import COMPACTION_TIMEOUT_S, StepRecords
from rlhf_dist.errors import StorageError
from rlhf_dist.observability.metrics import read_metrics


class Around:
    """Everything that the records lean on."""

    def __init__(self, tmp_path, settings, learner, problem=None, first_step=0):
        self.folder = RunFolder(tmp_path)
        self.said, self.shown, self.compacted, self.terminated = [], [], [], []
        self.recovery = SimpleNamespace(survive=lambda work, **_: work(), is_restoring=False, step=first_step)

        def ask(make, then, *, timeout_s):
            self.compacted.append((make(), timeout_s))
            then(problem)

        self.records = StepRecords(
            settings,
            self.folder,
            SimpleNamespace(
                learner=SimpleNamespace(save=lambda _, folder: learner.save(folder)),
                queue=SimpleNamespace(checkpointed=lambda oldest: oldest),
            ),
            SimpleNamespace(queue=SimpleNamespace(ask=ask), events=None),
            self.recovery,
            SimpleNamespace(phase=lambda _: nullcontext()),
            SimpleNamespace(say=self.said.append, step_done=self.shown.append),
            first_step=first_step,
        )

    def do(self, *steps):
        for step in steps:
            self.records.step_done({"step": step, "reward_mean": 0.5})
            self.recovery.step = step + 1

    def told_to_end(self):
        log = SimpleNamespace(terminated=lambda path: self.terminated.append(path.name))
        return str(self.records.last_checkpoint(log))

    @property
    def checkpoints(self):
        return [path.name for path in list_checkpoints(self.folder.checkpoints)]


@pytest.fixture
def around(tmp_path, config, fake_learner):
    def make(*, learner=None, **options):
        settings = config(
            run={"dir": "runs/x", "num_steps": 5}, learner={"num_workers": 2}, checkpoint={"every_steps": 2}
        )
        return Around(tmp_path, settings, learner or fake_learner(), **options)

    return make


def test_every_step_is_logged_and_shown_and_the_state_saved_when_due_and_after_the_last(around):
    run = around()
    run.do(0)
    assert run.checkpoints == []
    run.do(1, 2, 3, 4)
    assert [metrics["step"] for metrics in read_metrics(run.folder.metrics)] == [0, 1, 2, 3, 4]
    assert [metrics["step"] for metrics in run.shown] == [0, 1, 2, 3, 4]
    assert run.checkpoints == ["step-000004", "step-000005"]
    assert run.said == []


def test_the_journal_may_forget_what_no_checkpoint_needs(around):
    run = around()
    run.do(0, 1, 2, 3, 4)
    assert run.compacted == [(oldest, COMPACTION_TIMEOUT_S) for oldest in (2, 2, 4)]


def test_what_could_not_be_compacted_is_said_and_ends_nothing(around):
    run = around(problem="the disk is full")
    run.do(0, 1)
    assert run.said == ["the disk is full"]
    assert run.checkpoints == ["step-000002"]


def test_steps_that_the_log_has_lost_are_told_of(around):
    run = around(first_step=3)
    (line,) = run.said
    assert f"{run.folder.metrics} has lost 3 of the 3 steps before step 3, the first of them step 0" in line


def test_told_to_end_the_state_after_the_last_step_is_saved(around):
    run = around()
    run.do(0, 1, 2)
    assert run.told_to_end() == "terminated; checkpoint step-000003 is written, --resume goes on from it"
    assert (run.checkpoints, run.terminated) == (["step-000002", "step-000003"], ["step-000003"])


def test_told_to_end_just_after_a_checkpoint_none_is_written_again(around):
    run = around()
    run.do(0, 1)
    before = len(run.compacted)
    assert "checkpoint step-000002 is written" in run.told_to_end()
    assert len(run.compacted) == before


def test_told_to_end_before_a_step_was_done(around):
    assert around().told_to_end() == "terminated before the first step was done; --resume begins again"


def test_told_to_end_while_the_learner_is_restored_nothing_is_saved(around):
    run = around()
    run.do(0)
    run.recovery.is_restoring = True
    assert "goes on from the journal" in run.told_to_end()
    assert run.checkpoints == []


def test_told_to_end_on_a_full_disk(around, fake_learner):
    run = around(learner=fake_learner(error=StorageError("no room")))
    run.do(0)
    assert run.told_to_end().startswith("terminated; no last checkpoint could be written (")
    assert run.terminated == []


def test_a_checkpoint_that_failed_is_tried_again_when_its_learner_is_back(around, fake_learner):
    learner = fake_learner(error=StorageError("no room"))
    run = around(learner=learner)

    def survive(work, **_):
        with pytest.raises(StorageError):
            work()
        learner.error = None
        work()

    run.recovery.survive = survive
    run.do(0, 1)
    assert run.checkpoints == ["step-000002"]
