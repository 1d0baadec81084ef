"""The file of a bench's figures is looked at before, and what fails in the end says where they are."""

from __future__ import annotations

import errno
import json
import os
import tempfile

import pytest

from rlhf_dist.bench.results_file import check_out, write_results
from rlhf_dist.errors import ConfigError, StorageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty, and the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_can_be_written_is_left_as_it_is(folder):
    file = folder / "old.json"
    file.write_text("old")
    for out in (None, file, folder / "new.json"):
        check_out(out)
    assert file.read_text() == "old"
    assert list(folder.iterdir()) == [file]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out {} is a folder; name a file in it"),
        ("no/a.json", "--out {}: there is no folder {parent}; make it first, or name another file"),
        ("file/a.json", "--out {}: there is no folder {parent}; make it first, or name another file"),
        (
            "a" * 300,
            "--out {}: it cannot be made in the folder {parent} (File name too long); name another file",
        ),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(out, message, folder):
    (folder / "file").touch()
    path = folder / out
    with pytest.raises(ConfigError) as caught:
        check_out(path)
    assert str(caught.value) == message.format(path, parent=path.parent)


def test_a_folder_that_may_not_be_written_is_refused(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"cannot be made in the folder .+ \(Permission denied\)"):
        check_out(folder / "a.json")


def test_figures_are_written_as_json(folder):
    write_results(folder / "a.json", {"seconds": [1.5]})
    assert json.loads((folder / "a.json").read_text()) == {"seconds": [1.5]}


def test_figures_that_cannot_be_written_in_the_end_are_in_the_table(folder, monkeypatch):
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(StorageError) as caught:
        write_results(folder / "a.json", {})
    assert str(caught.value) == (
        f"{folder / 'a.json'} cannot be written (No space left on device); make room there, or let it be "
        "written; the figures are in the table above only"
    )
