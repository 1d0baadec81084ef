"""Append-only JSON Lines: what was appended is there, a torn end is not, and there is one writer."""

from __future__ import annotations

import os

import pytest

from rlhf_dist.durable import JsonLines, JsonLinesLog, read_json_lines
from rlhf_dist.errors import RunError, StorageError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "log.jsonl"


def test_records_come_back_in_order_over_several_writers(path):
    first = JsonLinesLog(path)
    first.append([{"a": 1}, {"b": "ü\n"}])
    first.append([])
    first.close()
    second = JsonLinesLog(path)
    second.append([{"c": None}])
    assert read_json_lines(path) == JsonLines([{"a": 1}, {"b": "ü\n"}, {"c": None}], 0)


def test_a_missing_file_has_no_records(path):
    assert read_json_lines(path) == JsonLines([], 0)


def test_the_last_line_counts_only_when_it_is_whole(path):
    log = JsonLinesLog(path)
    log.append([{"a": 1}, {"b": 22}])
    log.close()
    content = path.read_bytes()
    assert content == b'{"a": 1}\n{"b": 22}\n'
    for length in range(len(content)):
        path.write_bytes(content[:length])
        whole = [{"a": 1}] if length >= 9 else []
        assert read_json_lines(path) == JsonLines(whole, length - 9 * len(whole)), length


def test_a_writer_goes_on_behind_the_last_whole_line(path):
    path.parent.mkdir()
    for torn in (b'{"b": 2', b"\x00\x00\x00\x00", b'{"b"\x00\x00\n'):
        path.write_bytes(b'{"a": 1}\n' + torn)
        assert read_json_lines(path) == JsonLines([{"a": 1}], len(torn))
        log = JsonLinesLog(path)
        log.append([{"c": 3}])
        log.close()
        assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_a_broken_line_before_the_last_is_an_error_that_names_it(path):
    path.parent.mkdir()
    path.write_bytes(b'{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(RunError, match=r"log\.jsonl line 2 is broken"):
        read_json_lines(path)


def test_a_second_writer_is_refused(path):
    first = JsonLinesLog(path)
    with pytest.raises(RunError, match=r"log\.jsonl is being written by another process"):
        JsonLinesLog(path)
    first.close()
    JsonLinesLog(path).close()


@pytest.mark.parametrize("where", ["os.mkdir", "fcntl.flock", "os.ftruncate", "os.fsync"])
def test_a_log_that_cannot_be_opened_is_one_message(where, path, monkeypatch):
    def fail(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(where, fail)
    with pytest.raises(StorageError) as caught:
        JsonLinesLog(path)
    assert str(caught.value) == (
        f"{path} cannot be written or locked (No locks available); make room there, or put run.dir on a file "
        "system that can be written and has locks (flock), then resume"
    )


def test_an_append_that_failed_leaves_nothing(path, monkeypatch):
    log = JsonLinesLog(path)
    log.append([{"a": 1}])

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"log\.jsonl cannot be written \(No space left on device\)"):
            log.append([{"b": 2}])
    log.append([{"c": 3}])
    assert read_json_lines(path) == JsonLines([{"a": 1}, {"c": 3}], 0)


def test_half_a_surrogate_pair_is_written_and_read(path):
    log = JsonLinesLog(path)
    log.append([{"reason": "bad \ud800 text, good ü"}])
    assert path.read_bytes() == '{"reason": "bad \\ud800 text, good ü"}\n'.encode()
    assert read_json_lines(path).records == [{"reason": "bad \ud800 text, good ü"}]


@pytest.mark.parametrize("line", ["5", "[]", "null"])
def test_a_line_that_is_no_object_is_broken(line, path):
    path.parent.mkdir()
    path.write_text(f'{line}\n{{"a": 1}}\n')
    with pytest.raises(RunError, match=r"log\.jsonl line 1 is broken"):
        read_json_lines(path)
