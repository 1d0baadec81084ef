"""Checkpoints on disk: whole or not there, the newest last, the best beside them."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
import xxhash

from rlhf_dist.config import CheckpointSettings
from rlhf_dist.driver import checkpoint as module
from rlhf_dist.driver.checkpoint import (
    RunState,
    Score,
    best_checkpoint,
    check_state,
    find_damage,
    list_checkpoints,
    read_state,
    save_checkpoint,
    state_before,
    step_of,
    why_no_score,
)
from rlhf_dist.errors import ConfigError, StorageError

WEIGHTS = "policy/parameters.safetensors"


def listed(folder):
    return [path.name for path in list_checkpoints(folder)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ writing


def test_a_checkpoint_has_the_learners_files_the_state_of_the_run_and_digests(tmp_path, save):
    path = save(tmp_path / "checkpoints", 20, score=0.5)
    assert path == tmp_path / "checkpoints" / "step-000020"
    assert (path / WEIGHTS).read_text() == "weights 20"
    assert json.loads((path / "state.json").read_text()) == {
        "next_step": 20,
        "algorithm": "ppo",
        "lora": None,
        "num_ranks": 2,
        "zero_stage": 2,
        "score": {"metric": "reward_mean", "value": 0.5},
    }
    digests = json.loads((path / "digests.json").read_text())
    assert digests.keys() == {WEIGHTS, "algorithm.pt", "state.json"}
    digest = xxhash.xxh3_128_hexdigest(b"weights 20")
    assert digests[WEIGHTS] == {"num_bytes": 10, "xxh3_128": digest}
    assert find_damage(path) is None


def test_the_state_of_a_run_says_what_wrote_it_and_how_it_scored(config):
    made = config(learner={"num_workers": 3, "zero_stage": 1, "lora": {"rank": 4}})
    state = state_before(7, made, {"reward_mean": 0.25, "kl_ref": 1.0})
    lora = {"rank": 4, "alpha": 16, "target_modules": None}
    assert state == RunState(7, "ppo", lora, num_ranks=3, zero_stage=1, score=Score("reward_mean", 0.25))


@pytest.mark.parametrize(
    ("metric", "metrics", "note"),
    [
        (None, {"reward_mean": 1.0}, None),
        ("reward", {"kl_ref": 1.0}, "checkpoint.best_metric: step 0 reported no reward"),
        (
            "reward_men",
            {"reward_mean": 1.0},
            "checkpoint.best_metric: step 0 reported no reward_men; did you mean reward_mean?",
        ),
        ("kl_ref", {"kl_ref": math.nan}, "checkpoint.best_metric: kl_ref of step 0 is no finite number"),
        ("kl_ref", {"kl_ref": math.inf}, "checkpoint.best_metric: kl_ref of step 0 is no finite number"),
        ("kl_ref", {"kl_ref": None}, "checkpoint.best_metric: kl_ref of step 0 is no finite number"),
    ],
)
def test_what_is_no_number_is_no_score_and_the_user_is_told(metric, metrics, note, config):
    made = config(checkpoint={"best_metric": metric})
    state = state_before(1, made, metrics)
    assert state.score is None
    assert why_no_score(state, made, metrics) == note


def test_a_score_needs_no_note(config):
    state = state_before(1, config(), {"reward_mean": 0.5})
    assert why_no_score(state, config(), {"reward_mean": 0.5}) is None


def test_only_the_last_ones_are_kept(tmp_path, save):
    for next_step in (5, 10, 15, 20):
        save(tmp_path, next_step, keep_last=2)
    assert names(tmp_path) == ["step-000015", "step-000020"]
    save(tmp_path, 25, keep_last=1)
    assert names(tmp_path) == ["step-000025"]


def test_later_ones_go_with_the_time_that_the_run_went_back_before(tmp_path, save):
    for next_step in (5, 10, 15):
        save(tmp_path, next_step, keep_last=3)
    save(tmp_path, 8, keep_last=2)
    assert names(tmp_path) == ["step-000005", "step-000008"]


def test_old_checkpoints_go_only_once_the_new_one_has_its_name(tmp_path, save, monkeypatch):
    save(tmp_path, 5, keep_last=1)
    order = []
    remove, sync = module._remove, module.sync_folder
    monkeypatch.setattr(module, "_remove", lambda path: (order.append(f"remove {path.name}"), remove(path)))
    monkeypatch.setattr(module, "sync_folder", lambda path: (order.append(f"sync {path.name}"), sync(path)))
    save(tmp_path, 10, keep_last=1)
    assert [line.partition(".new-")[0] for line in order] == [
        "sync policy",
        "sync .step-000010",
        f"sync {tmp_path.name}",
        "remove step-000005",
    ]
    assert names(tmp_path) == ["step-000010"]


@pytest.mark.parametrize("error", [RuntimeError("learner worker 1 died"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_older_checkpoints_and_no_half_one(error, tmp_path, save, fake_learner):
    save(tmp_path, 5)
    with pytest.raises(type(error)):
        save(tmp_path, 10, keep_last=1, learner=fake_learner(error=error))
    assert names(tmp_path) == ["step-000005"]
    assert find_damage(tmp_path / "step-000005") is None


@pytest.mark.parametrize("crash_at", range(8))
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(crash_at, tmp_path, save, monkeypatch):
    """Power is cut at the n-th change of the folder: what was there before, or the new one, is whole."""
    folder = tmp_path / "checkpoints"
    save(folder, 5, score=0.1)
    save(folder, 10, score=0.2, keep_last=1)
    changes = 0

    class PowerCut(BaseException):
        pass

    def counted(function):
        def call(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes > crash_at:
                raise PowerCut
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", counted(module.write_json))
        patch.setattr(module.Path, "rename", counted(module.Path.rename))
        patch.setattr(module, "sync_folder", counted(module.sync_folder))
        patch.setattr(module.shutil, "rmtree", counted(module.shutil.rmtree))
        with pytest.raises(PowerCut):
            save(folder, 15, score=0.3, keep_last=1)
    whole = list_checkpoints(folder)
    assert whole
    assert all(find_damage(path) is None for path in [*whole, best_checkpoint(folder)])
    save(folder, 15, score=0.3, keep_last=1)
    assert names(folder) == ["best-000015", "step-000015"]


def test_a_rank_that_was_cut_off_while_it_wrote_spoils_no_later_checkpoint(tmp_path, save, fake_learner):
    """The driver has given it up, but the file system is still there for it."""
    written_into = []

    class Learner(fake_learner):
        def save(self, folder):
            written_into.append(folder)
            files = super().save(folder)
            for earlier in written_into[:-1]:
                earlier.mkdir(exist_ok=True)
                (earlier / "algorithm.pt").write_text("of another time")
            return files

    with pytest.raises(RuntimeError):
        save(tmp_path, 5, learner=Learner(error=RuntimeError("learner worker 1 is lost")))
    path = save(tmp_path, 5, learner=Learner("weights 5"))
    assert find_damage(path) is None
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("operation", ["copytree", "rename"])
def test_where_only_what_comes_afterwards_fails_the_new_one_is_there_and_is_said_to_be(
    operation, tmp_path, save, monkeypatch
):
    save(tmp_path, 5)
    if operation == "copytree":
        monkeypatch.setattr(module.shutil, "copytree", no_space)
    else:
        rename = module.Path.rename
        monkeypatch.setattr(
            module.Path,
            "rename",
            lambda path, to: no_space() if path.name == "step-000005" else rename(path, to),
        )
    with pytest.raises(StorageError) as caught:
        save(tmp_path, 10, score=0.5, keep_last=1)
    text = str(caught.value)
    assert text.startswith(f"checkpoint {tmp_path / 'step-000010'} is written, where ")
    assert "removed or the best one cannot be copied: No space left on device; make room there" in text
    assert find_damage(tmp_path / "step-000010") is None
    assert {"step-000005", "step-000010"} <= set(names(tmp_path))


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path, save, fake_learner):
    save(tmp_path, 5, learner=fake_learner("first"))
    path = save(tmp_path, 5, learner=fake_learner("second"))
    assert (path / WEIGHTS).read_text() == "second"
    assert names(tmp_path) == ["step-000005"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["learner", "driver"])
def test_a_full_disk_is_named_with_the_folder_and_what_is_left(
    place, tmp_path, save, monkeypatch, fake_learner
):
    folder = tmp_path / "checkpoints"
    save(folder, 5)
    error = StorageError("policy/exp_avg.safetensors cannot be written (No space left on device)")
    if place == "driver":
        monkeypatch.setattr(module, "write_json", no_space)
    with pytest.raises(StorageError) as caught:
        save(folder, 10, keep_last=1, learner=fake_learner(error=error if place == "learner" else None))
    text = str(caught.value)
    assert text.startswith(f"no checkpoint can be saved before step 10 in {folder}, where ")
    assert "MB are free: " in text
    assert "No space left on device" in text
    assert "checkpoint step-000005 is whole; make room there" in text
    assert "then go on with --resume" in text
    assert names(folder) == ["step-000005"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, save):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"in .*/file/checkpoints, where it is not there: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 5)


# ------------------------------------------------------------------------------------------------ listing


def test_checkpoints_are_listed_from_the_oldest_to_the_newest(tmp_path, save):
    for next_step in (3, 20, 100, 999_999, 1_000_000):
        save(tmp_path, next_step, keep_last=9)
    assert listed(tmp_path) == ["step-000003", "step-000020", "step-000100", "step-999999", "step-1000000"]
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 20, 100, 999_999, 1_000_000]


def test_what_is_not_a_checkpoint_is_not_listed(tmp_path, save):
    save(tmp_path, 5, score=1.0)
    (tmp_path / "step-000010").mkdir()  # no digests.json
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / ".step-000015.new").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert listed(tmp_path) == ["step-000005"]
    assert list_checkpoints(tmp_path / "nothing") == []


# --------------------------------------------------------------------------------------------------- best


def test_the_best_one_stays_whatever_else_goes(tmp_path, save):
    for next_step, score in [(5, 0.1), (10, 0.9), (15, 0.4), (20, 0.8)]:
        save(tmp_path, next_step, score=score, keep_last=1)
    assert names(tmp_path) == ["best-000010", "step-000020"]
    best = best_checkpoint(tmp_path)
    assert (best / WEIGHTS).read_text() == "weights 10"
    assert find_damage(best) is None
    assert read_state(best).score == Score("reward_mean", 0.9)
    assert [path.name for path in list_checkpoints(tmp_path, with_best=True)] == [
        "best-000010",
        "step-000020",
    ]


def test_the_best_one_takes_no_room_while_it_is_also_one_of_the_last(tmp_path, save):
    path = save(tmp_path, 5, score=1.0)
    assert (path / WEIGHTS).samefile(best_checkpoint(tmp_path) / WEIGHTS)


def test_without_hard_links_the_best_one_is_copied(tmp_path, save, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(module.os, "link", refuse)
    path = save(tmp_path, 5, score=1.0)
    best = best_checkpoint(tmp_path)
    assert not (path / WEIGHTS).samefile(best / WEIGHTS)
    assert find_damage(best) is None


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("max", [0.1, 0.3, 0.2], 2),
        ("max", [0.3, 0.3, 0.2], 2),
        ("min", [0.3, 0.1, 0.2], 2),
        ("min", [0.3, None, 0.4], 1),
        ("max", [None, 0.1, None], 2),
        ("max", [("reward_mean", 0.9), ("kl_ref", 0.1), ("kl_ref", 0.0)], 2),
    ],
)
def test_the_best_by_a_metric(mode, scores, best, tmp_path, save):
    for next_step, score in enumerate(scores, start=1):
        save(tmp_path, next_step, score=score, keep_last=1, best_mode=mode)
    assert step_of(best_checkpoint(tmp_path)) == best


def test_a_damaged_best_one_is_replaced(tmp_path, save):
    save(tmp_path, 5, score=0.9, keep_last=1)
    (tmp_path / "best-000005" / "state.json").write_text("{")
    save(tmp_path, 10, score=0.1, keep_last=1)
    assert names(tmp_path) == ["best-000010", "step-000010"]


def test_without_a_score_there_is_no_best_one(tmp_path, save):
    save(tmp_path, 5)
    assert best_checkpoint(tmp_path) is None


# ------------------------------------------------------------------------------------------------- checks


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[3] ^= 1
    path.write_bytes(damaged)


DAMAGES = {
    "a bit": (lambda path: flip(path / WEIGHTS), f"{WEIGHTS} has other bytes than were written"),
    "a bit of the state": (lambda path: flip(path / "state.json"), "state.json has other bytes"),
    "cut": (lambda path: os.truncate(path / WEIGHTS, 4), f"{WEIGHTS} has 4 of 10 bytes"),
    "empty": (lambda path: os.truncate(path / "algorithm.pt", 0), "algorithm.pt has 0 of 5 bytes"),
    "gone": (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no digests": (lambda path: (path / "digests.json").unlink(), "digests.json is missing"),
    "broken digests": (lambda path: os.truncate(path / "digests.json", 9), "digests.json is broken"),
    "other digests": (lambda path: (path / "digests.json").write_text("[1]"), "digests.json is broken"),
    "odd digests": (lambda path: (path / "digests.json").write_text('{"a": 1}'), "digests.json is broken"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_and_named(damage, reason, tmp_path, save):
    path = save(tmp_path, 20)
    assert find_damage(path) is None
    damage(path)
    assert reason in find_damage(path)


def test_a_checkpoint_that_is_gone_is_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="step-000001 is gone"):
        find_damage(tmp_path / "step-000001")


def test_another_number_of_ranks_or_stage_can_go_on(tmp_path, save, config):
    path = save(tmp_path, 20)
    for num_workers, zero_stage in [(2, 2), (1, 3), (4, 0)]:
        state = check_state(path, config(learner={"num_workers": num_workers, "zero_stage": zero_stage}))
        assert (state.next_step, state.num_ranks, state.zero_stage) == (20, 2, 2)


def test_another_algorithm_is_told_how_to_resume(tmp_path, save, config):
    path = save(tmp_path, 20)
    with pytest.raises(ConfigError) as caught:
        check_state(path, config(algorithm={"name": "reinforce"}))
    assert str(caught.value) == (
        f"checkpoint {path} was written by algorithm.name=ppo, and this run has algorithm.name=reinforce; "
        "go on from it with algorithm.name=ppo, or set run.dir to a new folder, for a new run"
    )


def test_other_adapters_are_told_how_to_resume(tmp_path, save, config):
    lora = {"rank": 8, "alpha": 16, "target_modules": None}
    path = save(tmp_path, 20, lora=lora)
    assert check_state(path, config(learner={"lora": {"rank": 8}})).lora == lora
    with pytest.raises(ConfigError) as caught:
        check_state(path, config())
    assert str(caught.value) == (
        f"checkpoint {path} was written with learner.lora={json.dumps(lora)}, and this run has "
        f"learner.lora=null; go on from it with learner.lora='{json.dumps(lora)}', or set run.dir to a new "
        "folder, for a new run"
    )


def test_settings_reach_what_is_saved(tmp_path, config, fake_learner):
    """As the driver saves: the state from the configuration and the step's metrics."""
    made = config(checkpoint={"keep_last": 1, "best_metric": "kl_ref", "best_mode": "min"})
    assert isinstance(made.checkpoint, CheckpointSettings)
    for next_step, kl in enumerate([0.4, 0.1, 0.2], start=1):
        state = state_before(next_step, made, {"kl_ref": kl, "reward_mean": next_step})
        save_checkpoint(tmp_path, fake_learner().save, state, made.checkpoint)
    assert names(tmp_path) == ["best-000002", "step-000003"]
