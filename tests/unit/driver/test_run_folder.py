"""The run folder: one run owns it, a run in it is not overwritten by accident, and files change at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.driver.run_folder import RunFolder, trial_folder, write_atomically, write_json
from rlhf_dist.errors import ConfigError, StorageError

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from rlhf_dist.driver.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).owned("refuse"):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "a")


@pytest.fixture
def finished(folder):
    """A folder in which a run has been through, with a file of the user's own."""
    with folder.owned("refuse"):
        for path in (
            folder.initial_policy,
            folder.sft_policy,
            folder.policy,
            folder.policy_adapter,
            folder.checkpoints / "step-000020",
            folder.journal,
        ):
            path.mkdir(parents=True)
            (path / "file").write_text("old")
        for path in (
            folder.metrics,
            folder.answers,
            folder.config,
            folder.prompts,
            folder.root / "my-notes.txt",
        ):
            path.write_text("old")
    return folder


def names(folder):
    return {path.name for path in folder.root.iterdir()} - {".lock", ".rlhf-dist-run"}


EVERYTHING = {
    *("initial-policy", "sft-policy", "policy", "policy-adapter", "checkpoints", "journal"),
    *("metrics.jsonl", "answers.json", "config.yaml", "prompts.json", "my-notes.txt"),
}


# ------------------------------------------------------------------------------------------- ownership


def test_a_new_folder_is_made_with_its_parents(folder):
    with folder.owned("refuse"):
        assert folder.root.is_dir()
        assert names(folder) == set()


def test_a_finished_run_is_not_touched_without_being_told_to(finished):
    with pytest.raises(ConfigError) as caught, finished.owned("refuse"):
        pass
    assert str(caught.value) == (
        f"run folder {finished.root} already holds a run; pass --resume to go on with it, "
        "--overwrite to delete it, or set run.dir"
    )
    assert names(finished) == EVERYTHING


def test_overwriting_deletes_the_run_and_nothing_else_and_only_when_it_is_cleared(finished):
    with finished.owned("overwrite"):
        assert names(finished) == EVERYTHING, "first everything is checked"
        finished.clear()
        assert names(finished) == {"my-notes.txt"}
    assert (finished.root / "my-notes.txt").read_text() == "old"


@pytest.mark.parametrize("if_exists", ["refuse", "overwrite", "resume"])
def test_a_folder_that_was_not_made_for_a_run_is_never_touched(if_exists, folder):
    (folder.policy).mkdir(parents=True)
    folder.config.write_text("precious")
    with pytest.raises(ConfigError, match="was not made for a run"), folder.owned(if_exists):
        pass
    assert names(folder) == {"policy", "config.yaml"}
    assert folder.config.read_text() == "precious"


def test_resume_leaves_everything_in_place(finished):
    with finished.owned("resume"):
        assert names(finished) == EVERYTHING


@pytest.mark.parametrize("if_exists", ["refuse", "overwrite", "resume"])
def test_every_choice_works_in_an_empty_folder(if_exists, folder):
    with folder.owned(if_exists):
        assert names(folder) == set()


@pytest.mark.parametrize(
    ("made", "holds"),
    [
        ((), False),
        (("initial-policy/", "sft-policy/", "config.yaml"), False),
        (("metrics.jsonl",), True),
        (("checkpoints/",), True),
    ],
)
def test_a_folder_holds_a_run_from_the_first_learner_step_on(made, holds, folder):
    folder.root.mkdir(parents=True)
    for name in made:
        path = folder.root / name
        path.mkdir() if name.endswith("/") else path.write_text("x")
    assert folder.holds_run() is holds


def test_an_empty_metrics_file_is_no_run_yet(folder):
    folder.root.mkdir(parents=True)
    folder.metrics.touch()
    assert not folder.holds_run()


def test_what_was_generated_before_the_first_step_can_be_resumed(folder):
    folder.journal.mkdir(parents=True)
    assert not folder.can_be_resumed()
    (folder.journal / "steps.jsonl").touch()
    assert folder.can_be_resumed()
    assert not folder.holds_run()


def test_what_a_run_left_before_its_first_step_is_cleared_away(folder):
    with folder.owned("refuse"):
        (folder.initial_policy / "half").mkdir(parents=True)
        folder.metrics.touch()
    with folder.owned("refuse"):
        folder.clear()
        assert names(folder) == set()


def test_a_folder_in_which_another_process_runs_is_refused(folder):
    arguments = [sys.executable, "-c", HOLD_THE_LOCK, str(folder.root)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "mine\n"
            folder.metrics.write_text("theirs")
            for if_exists in ("refuse", "overwrite", "resume"):
                with pytest.raises(ConfigError) as caught, folder.owned(if_exists):
                    pass
                assert str(caught.value) == (
                    f"run folder {folder.root} is in use by another run; wait for it, or set run.dir"
                )
            assert folder.metrics.read_text() == "theirs"
        finally:
            other.kill()
    with folder.owned("resume"):  # the lock of a killed process is gone with it
        assert folder.metrics.read_text() == "theirs"


def test_the_lock_is_given_back_when_the_run_fails(folder):
    with pytest.raises(KeyError), folder.owned("refuse"):
        raise KeyError
    with folder.owned("refuse"):
        pass


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named_with_the_reason(place, tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / place)
    message = f"^run folder {folder.root} cannot be written \\(.+\\); set run.dir$"
    with pytest.raises(ConfigError, match=message), folder.owned("refuse"):
        pass


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("where", ["pathlib.Path.mkdir", "pathlib.Path.touch"])
def test_a_full_disk_is_not_a_wrong_folder(where, folder, monkeypatch):
    monkeypatch.setattr(where, failing(errno.ENOSPC))
    if where.endswith("touch"):
        folder.root.mkdir(parents=True)
    with pytest.raises(StorageError) as caught, folder.owned("refuse"):
        pass
    path = folder.marker if where.endswith("touch") else folder.root
    assert str(caught.value) == (
        f"{path} cannot be written (No space left on device); make room there, or let the run write there, "
        "then start it again"
    )


def test_a_file_system_without_locks_is_named(folder, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
    with pytest.raises(ConfigError) as caught, folder.owned("refuse"):
        pass
    assert str(caught.value) == (
        f"run folder {folder.root} cannot be locked (No locks available); set run.dir to a folder on a file "
        "system that has locks (flock)"
    )


def test_a_trial_folder_is_there_for_the_block(tmp_path, monkeypatch):
    with trial_folder(tmp_path) as trial:
        (trial / "file").touch()
        assert trial.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("os.mkdir", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\); make room"):
        trial_folder(tmp_path).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named_with_the_reason(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\); set run\.dir"),
        RunFolder(tmp_path / "run").owned("refuse"),
    ):
        pass


def test_every_path_lies_in_the_folder_under_its_own_name(folder):
    properties = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(folder, name) for name in properties]
    assert len(set(paths)) == len(paths) == 12
    assert all(path.parent == folder.root for path in paths)


# ---------------------------------------------------------------------------------------------- files


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    write_atomically(path, "one: é\n")
    assert path.read_text(encoding="utf-8") == "one: é\n"
    write_atomically(path, "")
    assert path.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.rename"])
def test_a_write_that_fails_leaves_the_old_text(where, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, fail)
    with pytest.raises(
        StorageError, match=r"config\.yaml cannot be written \(No space left on device\); make room"
    ):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_text_is_on_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor):
        status = os.fstat(descriptor)
        events.append(("synced", "folder" if stat.S_ISDIR(status.st_mode) else status.st_size))
        fsync(descriptor)

    def record_rename(path, target):
        events.append(("renamed", target.name))
        return rename(path, target)

    monkeypatch.setattr("os.fsync", record_sync)
    monkeypatch.setattr("pathlib.Path.rename", record_rename)
    write_atomically(tmp_path / "a.json", "12345")
    assert events == [("synced", 5), ("renamed", "a.json"), ("synced", "folder")]


def test_json_is_readable_text(tmp_path):
    path = tmp_path / "answers.json"
    write_json(path, {"prompts": ["Où ?"], "n": None})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"prompts": ["Où ?"], "n": None}
    assert "Où ?" in text
    assert text.endswith("}\n")


def test_what_an_earlier_run_left_and_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.journal.mkdir()

    def refuse(path):
        if path == folder.journal:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "steps.jsonl"))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError) as error:
        folder.clear()
    assert f"{folder.journal / 'steps.jsonl'} of an earlier run cannot be deleted" in str(error.value)


def test_sample_answers_that_are_gone_are_none_and_broken_ones_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_answers()["prompts"] == []
    folder.answers.write_text('{"prompts": [')
    with pytest.raises(StorageError, match=r"answers\.json cannot be read .*; delete it to go on"):
        folder.read_answers()
