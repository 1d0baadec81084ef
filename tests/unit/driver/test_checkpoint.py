"""Checkpoints on disk: whole or not there, the newest last, and only for the group that wrote them."""

from __future__ import annotations

import json

import pytest

from rlhf_dist.driver.checkpoint import RunState, list_checkpoints, read_state, save_checkpoint
from rlhf_dist.errors import ConfigError


class FakeLearner:
    """Writes what it holds."""

    def __init__(self, content="weights", fails=False):
        self.content, self.fails = content, fails

    def save(self, folder):
        (folder / "policy").mkdir()
        (folder / "policy" / "rank-0.pt").write_text(self.content)
        if self.fails:
            raise RuntimeError("learner worker 1 died")


def state(next_step):
    return RunState(next_step=next_step, num_ranks=2, zero_stage=3)


def save(folder, next_step, *, keep_last=2, learner=None):
    return save_checkpoint(folder, learner or FakeLearner(), state(next_step), keep_last=keep_last)


def listed(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_a_checkpoint_has_the_learners_files_and_the_state_of_the_run(tmp_path):
    path = save(tmp_path / "checkpoints", 20)
    assert path == tmp_path / "checkpoints" / "step-000020"
    assert (path / "policy" / "rank-0.pt").read_text() == "weights"
    assert json.loads((path / "state.json").read_text()) == {"next_step": 20, "num_ranks": 2, "zero_stage": 3}
    assert read_state(path, num_ranks=2, zero_stage=3) == state(20)


def test_only_the_last_ones_are_kept(tmp_path):
    for next_step in (5, 10, 15, 20):
        save(tmp_path, next_step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]
    save(tmp_path, 25, keep_last=1)
    assert listed(tmp_path) == ["step-000025"]


def test_a_save_that_fails_leaves_the_older_checkpoints_and_no_half_one(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(RuntimeError, match="learner worker 1 died"):
        save(tmp_path, 10, keep_last=1, learner=FakeLearner(fails=True))
    assert listed(tmp_path) == ["step-000005"]
    save(tmp_path, 10, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_a_crash_before_the_files_are_synced_leaves_nothing_that_counts(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def crash(folder):
        assert (folder / "state.json").exists()
        raise OSError("power cut")

    monkeypatch.setattr("rlhf_dist.driver.checkpoint._sync", crash)
    with pytest.raises(OSError, match="power cut"):
        save(tmp_path, 10)
    assert listed(tmp_path) == ["step-000005"]


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 5, learner=FakeLearner("first"))
    path = save(tmp_path, 5, learner=FakeLearner("second"))
    assert (path / "policy" / "rank-0.pt").read_text() == "second"
    assert listed(tmp_path) == ["step-000005"]


def test_old_checkpoints_go_only_once_the_new_one_has_its_name(tmp_path, monkeypatch):
    save(tmp_path, 5, keep_last=1)
    removed = []
    monkeypatch.setattr(
        "rlhf_dist.driver.checkpoint.shutil.rmtree",
        lambda path, **_: removed.append((path.name, (tmp_path / "step-000010").exists())),
    )
    save(tmp_path, 10, keep_last=1)
    assert [each for each in removed if each[0] == "step-000005"] == [("step-000005", True)]


def test_checkpoints_are_listed_from_the_oldest_to_the_newest(tmp_path):
    for next_step in (1_000_000, 20, 100, 3, 999_999):
        save(tmp_path, next_step, keep_last=9)
    assert listed(tmp_path) == ["step-000003", "step-000020", "step-000100", "step-999999", "step-1000000"]


def test_what_is_not_a_whole_checkpoint_is_not_listed(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step-000010").mkdir()  # no state.json
    (tmp_path / ".step-000015.tmp").mkdir()
    (tmp_path / ".step-000015.tmp" / "state.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert listed(tmp_path) == ["step-000005"]


def test_without_a_folder_there_are_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 3), (2, 2), (4, 0)])
def test_another_group_is_told_how_to_resume(num_ranks, zero_stage, tmp_path):
    path = save(tmp_path, 20)
    with pytest.raises(ConfigError) as caught:
        read_state(path, num_ranks=num_ranks, zero_stage=zero_stage)
    assert str(caught.value) == (
        f"checkpoint {path} was written by 2 learner ranks with ZeRO stage 3; resume with "
        "learner.num_workers=2 learner.zero_stage=3"
    )
