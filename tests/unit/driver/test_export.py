"""Exports: a folder that is whole and on disk before it has its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_dist.driver.export import export_adapters
from rlhf_dist.errors import StorageError


class Learner:
    """Writes two files."""

    def export_adapters(self, _, folder):
        (folder / "below").mkdir(parents=True)
        (folder / "weights").write_text("12345")
        (folder / "below" / "more").write_text("123")


def test_files_and_folders_are_on_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    export_adapters(Learner(), None, tmp_path / "policy")
    assert sorted(events[:4]) == [".policy.tmp", "below", "more", "weights"]
    assert events[4:] == ["rename", tmp_path.name]
    assert (tmp_path / "policy" / "weights").read_text() == "12345"


def test_what_does_not_reach_the_disk_is_no_export(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"policy cannot be written: .*Input/output error"):
        export_adapters(Learner(), None, tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []
