"""What a replay starts from, what it refuses, and what it says in the end. No worker is started."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

from rlhf_dist.cluster.events import Events
from rlhf_dist.config import to_yaml
from rlhf_dist.driver.replay import Replay, ReplayedStep, _load, check_out, print_replay, verdict
from rlhf_dist.driver.replay_plan import make_plan
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.errors import ConfigError, DataError, ModelError, RunError, WorkerError
from rlhf_dist.experience import steps
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.types import BatchPlace, BatchRows

TRAINED = 6


class RunOnDisk(RunFolder):
    """A run of six trained steps and one under way; the samples of step s are in the segment w-s."""

    def make(self, config, save, *, checkpoints=(2, 4)):
        self.journal.mkdir(parents=True)
        self.config.write_text(to_yaml(config))
        log = StepsLog(self.journal)
        log.append([steps.started_record(samples_per_prompt=1, max_staleness=0)])
        for step in range(TRAINED + 1):
            segment = f"w-{step:06d}"
            (self.journal / f"{segment}.arrows").touch()
            rows = [BatchRows(BatchPlace(segment, 0), (0, 1))]
            log.append([steps.leased_record(step, [2 * step, 2 * step + 1], rows, step)])
            if step < TRAINED:
                log.append([steps.trained_record(step, f"digest {step}")])
        log.close()
        for step in checkpoints:
            save(self.checkpoints, step)
        for policy in (self.initial_policy, self.sft_policy):
            policy.mkdir()
            (policy / "config.json").write_text('{"model_type": "qwen2"}')
        return self

    def plan(self, *overrides, from_step=0, to_step=None):
        return make_plan(self, overrides, from_step=from_step, to_step=to_step)


@pytest.fixture
def make_run(tmp_path, config, save):
    """A run, with sections of its configuration replaced or added."""

    def make(*, checkpoints=(2, 4), **sections):
        return RunOnDisk(tmp_path / "run").make(config(**sections), save, checkpoints=checkpoints)

    return make


@pytest.fixture
def run(make_run):
    return make_run()


# -------------------------------------------------------------------------------- range and checkpoint


@pytest.mark.parametrize(
    ("asked", "checkpoint", "replayed"),
    [
        ((0, 2), None, [0, 1]),
        ((1, 2), None, [0, 1]),
        ((2, 3), "step-000002", [2]),
        ((3, 6), "step-000002", [2, 3, 4, 5]),
        ((4, 5), "step-000004", [4]),
        ((5, None), "step-000004", [4, 5]),
        ((0, None), None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_replay_goes_on_from_the_newest_checkpoint_before(asked, checkpoint, replayed, run):
    plan = run.plan(from_step=asked[0], to_step=asked[1])
    assert (plan.checkpoint and plan.checkpoint.name) == checkpoint
    assert [step.step for step in plan.steps] == replayed
    assert [step.policy_digest for step in plan.steps] == [f"digest {step}" for step in replayed]
    assert plan.from_step == asked[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((3, 3), "--from-step 3 --to-step 3 leaves no step to replay: --to-step itself is not replayed"),
        ((4, 2), "--from-step 4 --to-step 2 leaves no step to replay"),
        ((2, 9), "has the trained steps 0 to 5, and not all of 2 to 8; --to-step can be 6 at most"),
        ((0, 7), "has the trained steps 0 to 5, and not all of 0 to 6; --to-step can be 6 at most"),
        ((6, None), "has the trained steps 0 to 5, and not step 6; --from-step can be 5 at most"),
        ((8, 9), "and not step 8; --from-step can be 5 at most, --to-step can be 6 at most"),
    ],
)
def test_steps_that_the_journal_does_not_have_are_refused_with_those_that_it_has(asked, message, run):
    with pytest.raises(ConfigError) as caught:
        run.plan(from_step=asked[0], to_step=asked[1])
    assert message in str(caught.value)


def test_a_run_without_a_trained_step_has_nothing_to_replay(make_run):
    new = make_run(checkpoints=())
    (new.journal / "steps.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no trained step yet; there is nothing to replay"):
        new.plan()


def test_a_folder_without_a_journal_is_no_run(tmp_path):
    with pytest.raises(RunError, match="has no folder 'journal'"):
        RunOnDisk(tmp_path / "run").plan()


def test_planning_writes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    run.plan("algorithm.clip_low=0.1", from_step=3)
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


# --------------------------------------------------------------------------------------- what is missing


def delete_segments(run, *steps, noted=True):
    """Delete the samples of steps, as it is done to keep a journal small, or by hand."""
    for step in steps:
        (run.journal / f"w-{step:06d}.arrows").unlink()
    if noted:
        names = [f"w-{step:06d}" for step in steps]
        (run.journal / "deleted.jsonl").write_text(json.dumps({"segments": names}) + "\n")


def test_deleted_samples_are_named_with_the_first_step_that_can_be_replayed(run):
    delete_segments(run, 0, 1, 2)
    with pytest.raises(DataError) as caught:
        run.plan(from_step=3)
    assert str(caught.value) == (
        f"the samples of step 2 are no longer in journal {run.journal}: they were deleted to keep it small "
        "(experience.journal.max_gib); --from-step 4 and later are there"
    )
    assert [step.step for step in run.plan(from_step=4).steps] == [4, 5]


def test_samples_that_are_gone_otherwise_are_lost(run):
    delete_segments(run, 0)
    delete_segments(run, 2, noted=False)
    with pytest.raises(DataError) as caught:
        run.plan(from_step=3)
    assert str(caught.value) == (
        f"the samples of step 2 are no longer in journal {run.journal}: it has lost segment w-000002, and "
        f"`rlhf-dist inspect {run.root}` says what else; --from-step 4 and later are there"
    )
    with pytest.raises(DataError, match=r"of step 0 .* they were deleted to keep it small"):
        run.plan()


def test_deleted_samples_after_the_last_checkpoint_leave_nothing(run):
    delete_segments(run, 5)
    with pytest.raises(DataError, match=r"samples of step 5 .* no later step has a checkpoint$"):
        run.plan()
    assert [step.step for step in run.plan(to_step=5).steps] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sft", "made"), [({"demonstrations": "task:support-desk"}, "sft-policy"), (None, "initial-policy")]
)
@pytest.mark.parametrize("checkpoints", [(), (2,)])
def test_without_the_starting_policy_nothing_can_be_replayed(sft, made, checkpoints, make_run):
    new = make_run(sft=sft, checkpoints=checkpoints)
    assert new.plan(from_step=3).models.policy == str(new.root / made)
    shutil.rmtree(new.root / made)
    with pytest.raises(ModelError, match=f"the starting policy {new.root / made} is gone"):
        new.plan(from_step=3)


def test_a_policy_of_the_users_own_is_taken_from_where_it_is(make_run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"model_type": "qwen2"}')
    new = make_run(policy={"model": str(mine)}, sft=None)
    assert new.plan().models.policy == str(mine)
    moved = mine.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"policy model: folder '{mine}' does not exist"):
        new.plan()
    assert new.plan(f"policy.model={moved}").models.policy == str(moved)


def test_a_damaged_checkpoint_is_passed_over_and_named(run):
    (run.checkpoints / "step-000004" / "algorithm.pt").write_text("other")
    plan = run.plan(from_step=4)
    assert plan.checkpoint.name == "step-000002"
    assert [step.step for step in plan.steps] == [2, 3, 4, 5]
    (damaged,) = plan.damaged
    assert "step-000004 is damaged (algorithm.pt has other bytes than were written)" in str(damaged)


def test_the_copy_of_the_best_checkpoint_can_be_started_from(run, save):
    for step, score in [(3, 0.9), (5, 0.1), (6, 0.2)]:
        save(run.checkpoints, step, score=score, keep_last=2)
    assert run.plan(from_step=4).checkpoint.name == "best-000003"
    assert run.plan(from_step=5).checkpoint.name == "step-000005"
    delete_segments(run, 0)
    with pytest.raises(DataError, match="--from-step 3 and later are there"):
        run.plan(from_step=1)


class FakeLearner:
    """Reads a checkpoint, which the run may delete meanwhile."""

    def __init__(self, *, deleted):
        self._deleted = deleted

    def load(self, _, folder):
        if self._deleted:
            shutil.rmtree(folder)
        raise WorkerError("learner worker 0 failed to load a checkpoint")


def test_a_checkpoint_that_the_run_deletes_meanwhile_does_not_count(run):
    with pytest.raises(RunError, match="step-000002 was deleted while it was to be read: the run goes on"):
        _load(FakeLearner(deleted=True), Events(), run.checkpoints / "step-000002")


def test_a_checkpoint_that_cannot_be_loaded_is_another_thing(run):
    with pytest.raises(WorkerError, match="failed to load"):
        _load(FakeLearner(deleted=False), Events(), run.checkpoints / "step-000002")


# ---------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("overrides", "explained"),
    [
        ((), False),
        (("algorithm.clip_low=0.1",), True),
        (("learner.threads_per_worker=1",), True),
        (("run.seed=0",), False),
        (("run.seed=1", "cluster.step_timeout_s=9"), True),
        (("cluster.step_timeout_s=9", "learner.cpus_per_worker=0.5"), False),
        (("rollout.sampling.temperature=0.9",), True),
        (("learner.num_workers=1", "learner.zero_stage=0"), True),
        (("learner.policy_optimizer.learning_rate=1", "learner.value_optimizer.beta1=0"), True),
    ],
)
def test_only_what_the_learner_computes_with_explains_another_policy(overrides, explained, run):
    assert run.plan(*overrides, from_step=2).changed == (overrides if explained else ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.0.weight=2", "override 'reward.0.weight=2': reward.0.weight does not reach the learner"),
        ("run.dir=elsewhere", "override 'run.dir=elsewhere': run.dir does not reach the learner"),
        ("policy.model=other", "override 'policy.model=other': policy.model does not reach the learner"),
        ("rollout.sampling.top_k=5", "rollout.sampling.top_k does not reach the learner"),
        ("algorithm.clip_lo=1", "unknown key algorithm.clip_lo; did you mean algorithm.clip_low?"),
        ("algorithm", "'algorithm' is not an override"),
    ],
)
def test_an_override_without_an_effect_is_refused(override, message, run):
    with pytest.raises(ConfigError) as caught:
        run.plan(override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lora={rank: 4}", "was written with learner.lora=null, and this run has learner.lora="),
        (
            "algorithm={name: reinforce}",
            "was written by algorithm.name=ppo, and this run has algorithm.name=",
        ),
    ],
)
def test_what_a_checkpoint_fixes_can_be_changed_from_the_start_only(override, message, run):
    with pytest.raises(ConfigError) as caught:
        run.plan(override, from_step=2)
    assert message in str(caught.value)
    assert str(caught.value).endswith(", or replay with --from-step 0, which needs no checkpoint")
    for step in (0, 1):
        assert run.plan(override, from_step=step).changed == (override,)


def test_a_reference_that_nobody_asked_was_not_written_down(make_run):
    new = make_run(algorithm={"name": "ppo", "kl": {"coef": 0}}, checkpoints=())
    assert new.plan("algorithm.clip_low=0.1").models.reference is None
    with pytest.raises(ConfigError, match=r"kl\.coef=0\.1 needs the reference's log-probabilities"):
        new.plan("algorithm.kl.coef=0.1")


# ----------------------------------------------------------------------------------------------- --out


def test_the_policy_goes_into_a_new_folder_outside_of_the_run(tmp_path, run):
    check_out(tmp_path / "policy", run.root)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", run.root)
    for place, message in (
        (run.root / "policy", "lies in the run folder"),
        (run.root, "lies in the run folder"),
        (run.config.parent.parent / "no" / "policy", "there is no folder .*/no that can be written"),
        (tmp_path, "exists and is not an empty folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_out(place, run.root)


# ---------------------------------------------------------------------------------------------- report


def replayed(step, digest, recorded="a" * 32, loss=-0.25):
    return ReplayedStep(step, 16, 0.5, loss, recorded_digest=recorded, replayed_digest=digest)


def report(*steps, changed=()):
    text = io.StringIO()
    console = Console(file=text, width=200)
    print_replay(console, Replay("step-000002", 2, steps, changed))
    return text.getvalue()


def test_the_report_shows_both_digests_of_each_step():
    text = report(replayed(2, "a" * 32), replayed(3, "b" * 32, loss=None))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [
        ["2", "16", "0.5000", "-0.2500", "a" * 12, "a" * 12, "yes"],
        ["3", "16", "0.5000", "-", "a" * 12, "b" * 12, "no"],
    ]
    assert "step 3 is the first that gave another policy than the run had" in text


def test_a_verdict_for_each_outcome():
    same, other = replayed(4, "a" * 32), replayed(5, "b" * 32)
    assert Replay(None, 0, (same,), ()).as_expected
    assert verdict(Replay(None, 0, (same,), ())) == "every step gave the policy that the run had, bit for bit"
    assert not Replay(None, 0, (same, other), ()).as_expected
    changed = Replay("step-000003", 3, (same, other), ("algorithm.clip_low=0.1",))
    assert changed.as_expected
    assert not changed.same
    assert verdict(changed) == (
        "1 of 2 steps gave another policy than the run had, as is to be expected with algorithm.clip_low=0.1 "
        "from step 3 on"
    )


def test_a_step_without_a_recorded_digest_is_not_the_same():
    assert not replayed(1, "b" * 32, recorded=None).same
