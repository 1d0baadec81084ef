"""The file of losses and recoveries."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from rlhf_dist.errors import StorageError
from rlhf_dist.observability.run_events import RunEvents, read_run_events


def test_each_event_is_a_line_with_its_time_and_the_step_under_way(tmp_path):
    said = []
    log = RunEvents(tmp_path / "events.jsonl", said.append)
    before = datetime.now(UTC)
    log.step = 3
    log.lost("rollout", "rollout worker 1", "its process is gone", "it died")
    log.step = 4
    log.recovered("rollout", "rollout worker 1", "replaced", 1.23456, dispatched_again=7)
    lost, recovered = read_run_events(tmp_path / "events.jsonl")
    assert before <= datetime.fromisoformat(lost.pop("time")) <= datetime.fromisoformat(recovered.pop("time"))
    assert lost == {
        "event": "lost",
        "step": 3,
        "role": "rollout",
        "worker": "rollout worker 1",
        "noticed": "its process is gone",
        "error": "it died",
    }
    assert recovered == {
        "event": "recovered",
        "step": 4,
        "role": "rollout",
        "worker": "rollout worker 1",
        "action": "replaced",
        "seconds": 1.235,
        "dispatched_again": 7,
        "scored_again": 0,
        "replayed_steps": 0,
    }
    assert said == [
        "lost rollout worker 1: its process is gone",
        "recovered rollout worker 1 in 1.2 s: replaced, dispatched again: 7",
    ]


def test_a_later_process_appends(tmp_path):
    path = tmp_path / "events.jsonl"
    RunEvents(path, print).terminated(tmp_path / "step-000004")
    log = RunEvents(path, print)
    log.step = 4
    log.resumed(4, recorded_steps=3)
    terminated, resumed = read_run_events(path)
    assert (terminated["event"], terminated["checkpoint"]) == ("terminated", "step-000004")
    del resumed["time"]
    assert resumed == {"event": "resumed", "step": 4, "first_step": 4, "recorded_steps": 3}


def test_a_torn_last_line_is_left_out_and_no_file_means_no_event(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_run_events(path) == []
    RunEvents(path, print).resumed(0, 0)
    with path.open("a") as file:
        file.write('{"time": "20')
    assert len(read_run_events(path)) == 1
    RunEvents(path, print).resumed(0, 0)
    assert [event["event"] for event in read_run_events(path)] == ["resumed", "resumed"]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u001c", "\n", "\r\n"])
def test_an_error_may_have_any_separator_in_its_text(separator, tmp_path):
    path = tmp_path / "events.jsonl"
    error = f"KeyError: 'one{separator}two'"
    RunEvents(path, print).lost("scoring", "scoring worker 0", "a reward raised", error)
    RunEvents(path, print).resumed(0, recorded_steps=0)
    assert [event.get("error") for event in read_run_events(path)] == [error, None]


@pytest.mark.parametrize("torn", [b"\0\0\0\n", b'{"time": "20\n', b"\0\0\0", "é".encode()[:1]])
def test_whatever_a_crash_left_of_the_last_line_is_cut_off(torn, tmp_path):
    path = tmp_path / "events.jsonl"
    RunEvents(path, print).resumed(0, recorded_steps=0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [event["event"] for event in read_run_events(path)] == ["resumed"]
    RunEvents(path, print)
    assert path.read_bytes() == whole


def test_a_full_disk_is_said(tmp_path):
    with pytest.raises(StorageError, match=r"cannot be written \(No such file or directory\)"):
        RunEvents(tmp_path / "gone" / "events.jsonl", print).resumed(0, 0)
