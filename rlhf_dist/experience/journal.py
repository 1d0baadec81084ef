"""The journal: scored experience in the run's folder, on disk before it counts.

    journal/scoring-worker-0-000003.arrows    a segment: an Arrow IPC stream that one producer appended to
    journal/archive-000001.arrow              an archive: segments merged into a compressed Arrow IPC file
    journal/deleted.jsonl                     which segments the archives held that were deleted since
    journal/steps.jsonl                       which samples went to which learner step (see `steps`)

A batch has the place (segment, number in it), which stays its name in an archive, too. Only the last
message of a segment can be torn, since each is synced before the next is written. It carries a digest of its
bytes, as pages may reach the disk in any order; one that is cut short or does not match does not count. In an
archive the digest is of the decompressed batch.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from rlhf_dist.durable import read_json_lines, sync_folder
from rlhf_dist.errors import RunError, StorageError
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, check_version
from rlhf_dist.experience.steps import read_history
from rlhf_dist.types import BatchPlace, BatchRows

JOURNAL_FOLDER = "journal"
DELETED_FILE = "deleted.jsonl"
SEGMENT_SUFFIX = ".arrows"
ARCHIVE_SUFFIX = ".arrow"
DIGEST_KEY = b"rlhf_dist.digest"
SEGMENTS_KEY = b"rlhf_dist.segments"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
PREFIX_BYTES = 8
"""Of an encapsulated message: a marker, and the length of the metadata that comes before the body."""
MAX_OPEN_FILES = 128
EXPERIENCE_COLUMNS = tuple(EXPERIENCE_SCHEMA.names)
SAMPLE_KEY = ("ordinal", "sample", "attempt")


class JournalWriter:
    """Appends one producer's batches. It never goes on with a segment that it did not begin itself."""

    def __init__(self, folder: Path, producer: str, *, max_segment_bytes: int) -> None:
        """Nothing is made before the first batch.

        Args:
            folder: of the journal.
            producer: name of the process that writes; two that have the same get segments of their own.
            max_segment_bytes: a segment that has reached them is ended.
        """
        self._folder, self._max_segment_bytes = folder, max_segment_bytes
        self._producer = re.sub(r"[^A-Za-z0-9]+", "-", producer)
        self._segment: _OpenSegment | None = None

    def append(self, batch: pa.RecordBatch) -> BatchPlace:
        """Write one scored batch; it is on disk when this returns.

        Raises:
            RunError: it has another schema version.
            StorageError: it cannot be written; the journal stays readable, and the next batch begins a new
                segment.
        """
        check_version(batch.schema)
        try:
            if self._segment is None:
                self._segment = self._next_segment()
            place = self._segment.append(batch)
        except OSError as error:
            self._abandon()
            raise StorageError(
                f"journal {self._folder} cannot be written ({error.strerror}); make room, then resume"
            ) from error
        if self._segment.num_bytes >= self._max_segment_bytes:
            self.close()
        return place

    def close(self) -> None:
        """End the segment. Its batches are on disk whether or not the mark of its end gets there."""
        if self._segment is not None:
            with suppress(OSError):
                self._segment.write_end()
            self._abandon()

    def _next_segment(self) -> _OpenSegment:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = max(segment_numbers(self._folder).get(self._producer, [0])) + 1
        while True:
            path = self._folder / f"{self._producer}-{number:06d}{SEGMENT_SUFFIX}"
            try:
                segment = _OpenSegment(path)
            except FileExistsError:  # another writer of the name was faster
                number += 1
                continue
            sync_folder(self._folder)
            return segment

    def _abandon(self) -> None:
        if self._segment is not None:
            self._segment.abandon()
            self._segment = None


class _OpenSegment:
    """A segment under way, locked for as long as its writer lives."""

    def __init__(self, path: Path) -> None:
        self._name = path.name.removesuffix(SEGMENT_SUFFIX)
        self._file = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._unwritten = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._unwritten, EXPERIENCE_SCHEMA)
        self._num_batches = 0
        self.num_bytes = 0

    def append(self, batch: pa.RecordBatch) -> BatchPlace:
        self._stream.write_batch(batch, custom_metadata={DIGEST_KEY: _batch_digest(batch)})
        self._write()
        self._num_batches += 1
        return BatchPlace(self._name, self._num_batches - 1)

    def write_end(self) -> None:
        self._stream.close()
        self._write()

    def abandon(self) -> None:
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


@dataclass(frozen=True)
class TornTail:
    """The end of a segment that was never wholly written, and so never counted."""

    segment: str
    num_bytes: int


class JournalReader:
    """Reads a journal, also one that is being written and compacted. Segments are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        """List what is there.

        Args:
            folder: of the journal; it may be missing, and then the journal is empty.
        """
        self.folder = folder
        self._open: OrderedDict[str, _Segment] = OrderedDict()
        self._archives: dict[Path, _Archive] = {}
        self._archive_of: dict[str, _Archive] = {}
        """By segment."""
        self._list_archives()

    def segments(self) -> list[str]:
        """Segments with a file of their own, sorted. One that an archive holds is not among them."""
        names = sorted(path.stem for path in self.folder.glob(f"*{SEGMENT_SUFFIX}"))
        return [name for name in names if name not in self._archive_of]

    def archives(self) -> dict[Path, list[str]]:
        """The archives, oldest first, and the segments that each holds."""
        return {path: list(archive.segments) for path, archive in self._archives.items()}

    def deleted_segments(self) -> set[str]:
        """Those that were deleted to keep the journal small.

        Raises:
            RunError: a line before the last of the list is broken.
        """
        records = read_json_lines(self.folder / DELETED_FILE).records
        return {name for record in records for name in record["segments"]}

    def num_batches(self, segment: str) -> int:
        """Whole batches of a segment that has a file of its own."""
        return self._segment(segment).num_batches

    def torn_tails(self) -> list[TornTail]:
        """The segments that end in a batch which was never wholly written."""
        tails = [TornTail(name, self._segment(name).num_torn_bytes) for name in self.segments()]
        return [tail for tail in tails if tail.num_bytes]

    def batches(
        self, columns: Sequence[str] = EXPERIENCE_COLUMNS, *, with_archives: bool = True
    ) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        """Every whole batch with its place, archives first, each in order of its place.

        Only the columns asked for are read: a segment is mapped, of an archive the others stay compressed.
        """
        names = self.segments()  # first, as a segment that is missing here is in an archive by now
        self._list_archives()
        for archive in list(self._archives.values()) if with_archives else []:
            for name in archive.segments:
                yield from archive.batches(name, columns)
        for name in (each for each in names if each not in self._archive_of):
            try:
                for place, batch in self._segment(name).batches():
                    yield place, batch.select(columns)
            except FileNotFoundError:  # somebody has compacted the journal meanwhile
                self._list_archives()
                if with_archives and name in self._archive_of:
                    yield from self._archive_of[name].batches(name, columns)

    def damaged(self) -> list[BatchPlace]:
        """Batches that are no longer as they were written, by their digests: reads the whole journal."""
        found: list[BatchPlace] = []
        for archive in self._archives.values():
            for name in archive.segments:
                found += archive.damaged(name)
        for name in self.segments():
            with suppress(FileNotFoundError):  # compacted meanwhile, which checks every batch
                found += self._segment(name).damaged()
        return found

    def batches_of(self, segment: str) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        """Every whole batch of a segment that has a file of its own."""
        return self._segment(segment).batches()

    def read(self, place: BatchPlace) -> pa.RecordBatch:
        """One batch, its digest checked.

        Raises:
            RunError: the journal does not hold it, or it is damaged.
        """
        try:
            return self._segment(place.segment, at_least=place.batch + 1).checked_batch(place.batch)
        except FileNotFoundError:
            self._list_archives()
        if place.segment not in self._archive_of:
            raise RunError(
                f"journal {self.folder} has no segment {place.segment}: it was deleted to keep the journal "
                "small, or belongs to another run"
            )
        return self._archive_of[place.segment].batch(place)

    def holds(self, segment: str) -> bool:
        """Whether a segment is there, in a file of its own or in an archive."""
        if (self.folder / f"{segment}{SEGMENT_SUFFIX}").exists():
            return True
        self._list_archives()
        return segment in self._archive_of

    def read_rows(self, selection: Iterable[BatchRows]) -> list[pa.RecordBatch]:
        """The chosen rows of some batches, such as those of a lease. Raises as `read` does."""
        return [take_rows(self.read(place), rows) for place, rows in selection]

    def num_bytes(self) -> int:
        """Of all segments and archives on disk."""
        paths = [*self.folder.glob(f"*{SEGMENT_SUFFIX}"), *self.folder.glob(f"*{ARCHIVE_SUFFIX}")]
        return sum(path.stat().st_size for path in paths)

    def _segment(self, name: str, *, at_least: int = 0) -> _Segment:
        segment = self._open.pop(name, None)
        if segment is None or segment.num_batches < at_least:
            segment = _Segment(self.folder / f"{name}{SEGMENT_SUFFIX}")
        self._open[name] = segment
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return segment

    def _list_archives(self) -> None:
        for path in sorted(self.folder.glob(f"*{ARCHIVE_SUFFIX}")):
            if path not in self._archives:
                with suppress(FileNotFoundError):  # somebody has deleted it meanwhile
                    self._archives[path] = archive = _Archive(path)
                    self._archive_of |= dict.fromkeys(archive.segments, archive)


class _Segment:
    """A mapped segment and where its messages begin and end."""

    def __init__(self, path: Path) -> None:
        """Walk over the messages. Of their bodies only the last one of a segment that goes on is read."""
        self._path = path
        self._name = path.stem
        self._map = pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"")
        self._bounds: list[tuple[int, int, bytes]] = []
        size = self._map.size()
        try:
            stream = pa.ipc.open_stream(self._map)
        except (pa.ArrowInvalid, OSError):
            self.num_torn_bytes = size
            return
        check_version(stream.schema)
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
        return len(self._bounds)

    def batches(self) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        for number in range(self.num_batches):
            yield BatchPlace(self._name, number), self.batch(number)

    def batch(self, number: int) -> pa.RecordBatch:
        self._map.seek(self._bounds[number][0])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._map), self._schema)

    def checked_batch(self, number: int) -> pa.RecordBatch:
        if number >= self.num_batches:
            raise RunError(f"segment {self._path} has {self.num_batches} whole batches, no batch {number}")
        if not self._is_whole(number):
            raise RunError(f"batch {number} of segment {self._path} is damaged: its digest does not match")
        return self.batch(number)

    def damaged(self) -> list[BatchPlace]:
        numbers = range(self.num_batches)
        return [BatchPlace(self._name, number) for number in numbers if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        begin, end, digest = self._bounds[number]
        return _body_digest(memoryview(self._bytes(begin, end))) == digest

    def _bytes(self, begin: int, end: int) -> pa.Buffer:
        self._map.seek(begin)
        return self._map.read_buffer(end - begin)


class _Archive:
    """A file of merged segments."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map = pa.memory_map(str(path))
        self._file = pa.ipc.open_file(self._map)
        check_version(self._file.schema)
        self.segments: dict[str, range] = {}
        """Numbers of each one's batches in the file."""
        start = 0
        for name, num_batches in json.loads(self._file.metadata[SEGMENTS_KEY]):
            self.segments[name] = range(start, start + num_batches)
            start += num_batches

    def batches(self, segment: str, columns: Sequence[str]) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        indices = [EXPERIENCE_COLUMNS.index(name) for name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=sorted(indices))
        file = pa.ipc.open_file(self._map, options=options)
        for place, number in enumerate(self.segments[segment]):
            yield BatchPlace(segment, place), file.get_batch(number).select(columns)

    def batch(self, place: BatchPlace) -> pa.RecordBatch:
        numbers = self.segments[place.segment]
        if place.batch >= len(numbers):
            raise RunError(f"segment {place.segment} in {self._path} has no batch {place.batch}")
        if (batch := self._whole_batch(numbers[place.batch])) is None:
            raise RunError(f"batch {place.batch} of segment {place.segment} in {self._path} is damaged")
        return batch

    def damaged(self, segment: str) -> list[BatchPlace]:
        numbers = enumerate(self.segments[segment])
        return [BatchPlace(segment, place) for place, number in numbers if self._whole_batch(number) is None]

    def _whole_batch(self, number: int) -> pa.RecordBatch | None:
        """None where it cannot be decompressed, or is not what was."""
        try:
            batch, metadata = self._file.get_batch_with_custom_metadata(number)
        except (pa.ArrowInvalid, OSError):
            return None
        return batch if metadata is not None and metadata.get(DIGEST_KEY) == _batch_digest(batch) else None


def write_archive(path: Path, journal: JournalReader, segments: Sequence[str]) -> None:
    """Merge segments, which keep their names, into a compressed file; on disk when this returns.

    The file appears whole: it is written beside, synced and renamed. Nothing is left of it when this raises.

    Raises:
        RunError: a batch is damaged.
        OSError: the file cannot be written.
    """
    contents = [(name, journal.num_batches(name)) for name in segments]
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            _write_archive(file, journal, contents)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _write_archive(file: BinaryIO, journal: JournalReader, contents: Sequence[tuple[str, int]]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    metadata = {SEGMENTS_KEY: json.dumps(contents).encode()}
    with pa.ipc.new_file(file, EXPERIENCE_SCHEMA, options=options, metadata=metadata) as writer:
        for name, num_batches in contents:
            for number in range(num_batches):
                batch = journal.read(BatchPlace(name, number))
                writer.write_batch(batch, custom_metadata={DIGEST_KEY: _batch_digest(batch)})


def read_table(run_folder: Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """All scored samples of a run, each once, with the learner step that has it in a column `step`.

    Args:
        run_folder: the run's `run.dir`.
        columns: those of `EXPERIENCE_SCHEMA` to have; None for all. What nobody asks for is not read.

    Raises:
        RunError: the folder has no journal.
    """
    journal = open_journal(run_folder)
    steps = {
        (place, row): step.step
        for step in read_history(journal.folder).steps.values()
        for place, rows in step.samples
        for row in rows
    }
    names = list(columns) if columns is not None else list(EXPERIENCE_COLUMNS)
    batches: list[pa.RecordBatch] = []
    step_column: list[int | None] = []
    seen: dict[tuple[int, int, int], int] = {}
    for place, batch in journal.batches([*names, *(key for key in SAMPLE_KEY if key not in names)]):
        batches.append(batch.select(names))
        keys = zip(*(batch[name].to_pylist() for name in SAMPLE_KEY), strict=True)
        for row, key in enumerate(keys):
            step = steps.get((place, row))
            if key not in seen or step is not None:
                seen[key] = len(step_column)  # a second copy counts only if it is the one that was trained
            step_column.append(step)
    schema = pa.schema([EXPERIENCE_SCHEMA.field(name) for name in names])
    table = pa.Table.from_batches([batch.replace_schema_metadata() for batch in batches], schema)
    table = table.append_column("step", pa.array(step_column, pa.int64()))
    return table if len(seen) == len(table) else table.take(np.sort(list(seen.values())))


def open_journal(run_folder: Path | str) -> JournalReader:
    """The journal of a run.

    Raises:
        RunError: the folder has none.
    """
    folder = Path(run_folder) / JOURNAL_FOLDER
    if not folder.is_dir():
        raise RunError(f"{run_folder} has no folder {JOURNAL_FOLDER!r}; name the folder of a run (run.dir)")
    return JournalReader(folder)


def take_rows(batch: pa.RecordBatch, rows: Sequence[int]) -> pa.RecordBatch:
    """Some rows of a batch; the batch itself, without a copy, where those are all."""
    return batch if list(rows) == list(range(batch.num_rows)) else batch.take(pa.array(rows, pa.int64()))


def segment_numbers(folder: Path) -> dict[str, list[int]]:
    """By producer, the numbers of the segments that have a file of their own."""
    numbers: dict[str, list[int]] = {}
    for path in folder.glob(f"*{SEGMENT_SUFFIX}"):
        producer, _, number = path.stem.rpartition("-")
        numbers.setdefault(producer, []).append(int(number))
    return numbers


def _batch_digest(batch: pa.RecordBatch) -> bytes:
    return _body_digest(memoryview(batch.serialize()))


def _body_digest(message: memoryview) -> bytes:
    """xxh3-128 of an encapsulated message's body, which is the same whatever the metadata before it says."""
    metadata_bytes = int.from_bytes(message[4:PREFIX_BYTES], "little")
    return xxhash.xxh3_128_digest(message[PREFIX_BYTES + metadata_bytes :])
