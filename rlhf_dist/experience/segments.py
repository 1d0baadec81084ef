"""A segment of the journal: an Arrow IPC stream that one producer appends batches to."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import xxhash

from rlhf_dist.errors import RunError
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, check_schema
from rlhf_dist.types import BatchPlace

SEGMENT_SUFFIX = ".arrows"
DIGEST_KEY = b"rlhf_dist.digest"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
PREFIX_BYTES = 8
"""Of an encapsulated message: a marker, and the length of the metadata that comes before the body."""


class OpenSegment:
    """A segment under way, locked for as long as its writer lives."""

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            FileExistsError: it is there.
        """
        self._name = path.name.removesuffix(SEGMENT_SUFFIX)
        self._file = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._unwritten = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._unwritten, EXPERIENCE_SCHEMA)
        self._num_batches = 0
        self.num_bytes = 0
        """Of the file, so far."""

    def append(self, batch: pa.RecordBatch) -> BatchPlace:
        """Write a batch; it is on disk when this returns. Raises OSError where it cannot be written."""
        self._stream.write_batch(batch, custom_metadata={DIGEST_KEY: batch_digest(batch)})
        self._write()
        self._num_batches += 1
        return BatchPlace(self._name, self._num_batches - 1)

    def write_end(self) -> None:
        """Mark the segment as ended. Raises OSError."""
        self._stream.close()
        self._write()

    def abandon(self) -> None:
        """Close the file as it is, and let go of it."""
        self._file.close()

    def _write(self) -> None:
        content = self._unwritten.getbuffer()
        if (num_written := self._file.write(content)) != len(content):
            raise OSError(None, f"wrote {num_written} of {len(content)} bytes")
        os.fsync(self._file.fileno())
        self.num_bytes += len(content)
        content.release()
        self._unwritten.seek(0)
        self._unwritten.truncate()


class Segment:
    """A mapped segment and where its messages begin and end."""

    def __init__(self, path: Path) -> None:
        """Walk over the messages. Of their bodies only the last one of a segment that goes on is read."""
        self._path = path
        self.name = path.stem
        self._map = pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"")
        self._bounds: list[tuple[int, int, bytes]] = []
        size = self._map.size()
        try:
            stream = pa.ipc.open_stream(self._map)
        except (pa.ArrowInvalid, OSError):
            self.num_torn_bytes = size
            return
        check_schema(stream.schema, EXPERIENCE_SCHEMA)
        self._schema = stream.schema
        end = self._map.tell()
        try:
            while True:
                _, metadata = stream.read_next_batch_with_custom_metadata()
                begin, end = end, self._map.tell()
                self._bounds.append((begin, end, metadata[DIGEST_KEY]))
        except (StopIteration, pa.ArrowInvalid, OSError):
            pass
        self.num_torn_bytes = size - end
        if self._bytes(end, size) == END_OF_STREAM:
            self.num_torn_bytes = 0
        elif self._bounds and not self._is_whole(-1):
            self.num_torn_bytes = size - self._bounds.pop()[0]

    @property
    def num_batches(self) -> int:
        """Whole ones."""
        return len(self._bounds)

    def batches(self) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        """Each with its place, unchecked."""
        for number in range(self.num_batches):
            yield BatchPlace(self.name, number), self.batch(number)

    def batch(self, number: int) -> pa.RecordBatch:
        """One of them, unchecked and without a copy."""
        self._map.seek(self._bounds[number][0])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._map), self._schema)

    def checked_batch(self, number: int) -> pa.RecordBatch:
        """The same, checked. Raises RunError where it is not there, or damaged."""
        if number >= self.num_batches:
            raise RunError(f"segment {self._path} has {self.num_batches} whole batches, no batch {number}")
        if not self._is_whole(number):
            raise RunError(f"batch {number} of segment {self._path} is damaged: its digest does not match")
        return self.batch(number)

    def damaged(self) -> list[BatchPlace]:
        """Batches that are no longer as they were written."""
        numbers = range(self.num_batches)
        return [BatchPlace(self.name, number) for number in numbers if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        begin, end, digest = self._bounds[number]
        return _body_digest(memoryview(self._bytes(begin, end))) == digest

    def _bytes(self, begin: int, end: int) -> pa.Buffer:
        self._map.seek(begin)
        return self._map.read_buffer(end - begin)


def segment_numbers(folder: Path) -> dict[str, list[int]]:
    """By producer, the numbers of the segments that have a file of their own in a journal."""
    numbers: dict[str, list[int]] = {}
    for path in folder.glob(f"*{SEGMENT_SUFFIX}"):
        producer, _, number = path.stem.rpartition("-")
        if number.isdecimal():
            numbers.setdefault(producer, []).append(int(number))
    return numbers


def batch_digest(batch: pa.RecordBatch) -> bytes:
    """xxh3-128 of a batch's uncompressed bytes."""
    return _body_digest(memoryview(batch.serialize()))


def _body_digest(message: memoryview) -> bytes:
    """xxh3-128 of an encapsulated message's body, which is the same whatever the metadata before it says."""
    metadata_bytes = int.from_bytes(message[4:PREFIX_BYTES], "little")
    return xxhash.xxh3_128_digest(message[PREFIX_BYTES + metadata_bytes :])
