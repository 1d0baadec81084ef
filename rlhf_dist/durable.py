"""Files that survive a crash: append-only JSON Lines, and folders whose entries are on disk."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_dist.errors import RunError, StorageError

Record = dict[str, Any]

LOCK_POLL_S = 0.1


@dataclass(frozen=True)
class JsonLines:
    """What an append-only file holds."""

    records: list[Record]
    num_torn_bytes: int
    """Of a last line that was never finished; it does not count."""


class JsonLinesLog:
    """The one writer of an append-only file of JSON objects, a line each."""

    def __init__(self, path: Path, *, wait_s: float = 0.0) -> None:
        """Open or make the file; a torn last line is cut off.

        Args:
            wait_s: for another process that has it open to end.

        Raises:
            RunError: another process has it open for writing, or a line before the last is broken.
            StorageError: it cannot be written or locked.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            _lock(self._file, wait_s)
            self._size = path.stat().st_size - read_json_lines(path).num_torn_bytes
            os.ftruncate(self._file.fileno(), self._size)
            sync_folder(path.parent)
        except BlockingIOError as error:
            raise RunError(f"{path} is being written by another process; end that run first") from error
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written or locked ({error.strerror}); make room there, or put run.dir on "
                "a file system that can be written and has locks (flock), then resume"
            ) from error

    def append(self, records: Iterable[Record]) -> None:
        """Write the records; they are on disk when this returns, and none of them is when it raises.

        Raises:
            StorageError: they cannot be written.
        """
        lines = b"".join(map(json_line, records))
        if not lines:
            return
        try:
            os.ftruncate(self._file.fileno(), self._size)  # what an append that failed had left
            if (num_written := self._file.write(lines)) != len(lines):
                raise OSError(None, f"wrote {num_written} of {len(lines)} bytes")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written ({error.strerror}); make room, then resume"
            ) from error
        self._size += len(lines)

    def close(self) -> None:
        """Let another process write."""
        self._file.close()


def read_json_lines(path: Path) -> JsonLines:
    """All whole lines; a missing file has none.

    Raises:
        RunError: a line before the last is broken.
    """
    if not path.exists():
        return JsonLines([], 0)
    *lines, rest = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except ValueError as error:
            if number == len(lines) and not rest:
                return JsonLines(records, len(line) + 1)  # its pages did not all reach the disk
            raise RunError(f"{path} line {number} is broken: {line[:80]!r}") from error
    return JsonLines(records, len(rest))


def json_line(record: Record) -> bytes:
    """The record's line. Text that UTF-8 has no bytes for (half a surrogate pair) is escaped, as JSON can."""
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _record(line: bytes) -> Record:
    """Raises ValueError where the line is no JSON object."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record


def sync_folder(folder: Path) -> None:
    """Have the folder's entries on disk: files made, renamed and deleted in it stay so."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Have all files below a folder on disk, with what is in them, and the folders' entries."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: IO[bytes], wait_s: float) -> None:
    """Raises BlockingIOError once another process has held the lock for that long."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(LOCK_POLL_S)
