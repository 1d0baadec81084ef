"""`metrics.jsonl`: what is on disk after each step, after a crash, and after a resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from rlhf_dist.errors import RunError, StorageError
from rlhf_dist.observability.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def filled(path, num_steps):
    log = MetricsLog(path, first_step=0)
    for step in range(num_steps):
        log.append({"step": step, "reward_mean": step / 4})
    return log


def test_each_step_is_a_line_of_json_at_once(path):
    log = MetricsLog(path, first_step=0)
    assert path.read_text() == ""
    log.append({"step": 0, "reward_mean": 0.5})
    assert path.read_text() == '{"step": 0, "reward_mean": 0.5}\n'
    log.append({"step": 1, "note": "é\n"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "reward_mean": 0.5},
        {"step": 1, "note": "é\n"},
    ]


def test_steps_are_read_in_their_order(path):
    filled(path, 3)
    assert read_metrics(path) == [{"step": step, "reward_mean": step / 4} for step in range(3)]


def test_no_file_has_no_steps(path):
    assert read_metrics(path) == []


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_opening_at_a_step_forgets_those_that_will_be_done_again(first_step, kept, path):
    filled(path, 4)
    log = MetricsLog(path, first_step=first_step)
    assert [row["step"] for row in read_metrics(path)] == kept
    assert log.missing_steps == [step for step in range(first_step) if step not in kept]
    log.append({"step": first_step, "again": True})
    assert read_metrics(path)[-1] == {"step": first_step, "again": True}
    assert [row["step"] for row in read_metrics(path)] == [*kept, first_step]


def test_kept_steps_are_the_same_to_the_last_digit(path):
    log = MetricsLog(path, first_step=0)
    log.append({"step": 0, "x": 0.1 + 0.2, "none": None, "count": 3})
    before = path.read_text()
    MetricsLog(path, first_step=1)
    assert path.read_text() == before
    assert read_metrics(path)[0]["x"] == 0.1 + 0.2


@pytest.mark.parametrize(
    "torn",
    ['{"step": 2, "rew', '{"step": 2, "reward_mean": 0.5}', " ", "\0\0\0", "\0\0\0\n", '{"step": 2, "rew\n'],
)
def test_a_torn_last_line_is_left_out(torn, path):
    filled(path, 2)
    with path.open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


@pytest.mark.parametrize("torn", ['{"step": 2, "rew', '{"step": 2, "rew\n', "\0\0\n"])
def test_after_a_torn_line_the_log_goes_on_with_whole_ones(torn, path):
    filled(path, 2)
    with path.open("a") as file:
        file.write(torn)
    MetricsLog(path, first_step=2).append({"step": 2, "reward_mean": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_broken_line_before_the_last_is_one_message(path):
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 is broken"):
        MetricsLog(path, first_step=3)


def test_a_separator_in_a_text_ends_no_line(path):
    path.write_text('{"step": 0, "note": "one\u2028two"}\n', encoding="utf-8")
    assert read_metrics(path) == [{"step": 0, "note": "one\u2028two"}]


def test_the_name_of_the_new_log_is_on_disk_before_a_step_is(path, monkeypatch):
    events = []
    fsync = os.fsync

    def record_sync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_sync)
    filled(path, 1)
    assert events == ["metrics.tmp", path.parent.name, "metrics.jsonl"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_json_has_no_number_for_becomes_null(number, path):
    MetricsLog(path, first_step=0).append({"step": 0, "gap": number, "reward_mean": 1.5})
    assert path.read_text() == '{"step": 0, "gap": null, "reward_mean": 1.5}\n'
    assert read_metrics(path) == [{"step": 0, "gap": None, "reward_mean": 1.5}]


def test_opening_leaves_one_file(path):
    filled(path, 1)
    MetricsLog(path, first_step=1)
    assert [each.name for each in path.parent.iterdir()] == ["metrics.jsonl"]


def test_the_old_log_is_there_until_the_new_one_is_whole(path, monkeypatch):
    filled(path, 3)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(StorageError, match="disk full"):
        MetricsLog(path, first_step=1)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_clear_message(path):
    log = filled(path, 1)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written \(No space left on device\)"):
        log.append({"step": 1})
