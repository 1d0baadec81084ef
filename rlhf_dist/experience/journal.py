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

import re
import warnings
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rlhf_dist.durable import read_json_lines, sync_folder
from rlhf_dist.errors import RunError, StorageError
from rlhf_dist.experience.archives import ARCHIVE_SUFFIX, Archive
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, check_schema
from rlhf_dist.experience.segments import SEGMENT_SUFFIX, OpenSegment, Segment, segment_numbers
from rlhf_dist.experience.steps import read_history
from rlhf_dist.types import BatchPlace, BatchRows

JOURNAL_FOLDER = "journal"
DELETED_FILE = "deleted.jsonl"
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
        self._segment: OpenSegment | None = None

    def append(self, batch: pa.RecordBatch) -> BatchPlace:
        """Write one scored batch; it is on disk when this returns.

        Raises:
            RunError: it has another schema version.
            StorageError: it cannot be written; the journal stays readable, and the next batch begins a new
                segment.
        """
        check_schema(batch.schema, EXPERIENCE_SCHEMA)
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

    def _next_segment(self) -> OpenSegment:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = max(segment_numbers(self._folder).get(self._producer, [0])) + 1
        while True:
            path = self._folder / f"{self._producer}-{number:06d}{SEGMENT_SUFFIX}"
            try:
                segment = OpenSegment(path)
            except FileExistsError:  # another writer of the name was faster
                number += 1
                continue
            sync_folder(self._folder)
            return segment

    def _abandon(self) -> None:
        if self._segment is not None:
            self._segment.abandon()
            self._segment = None


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
        self._open: OrderedDict[str, Segment] = OrderedDict()
        self._archives: dict[Path, Archive] = {}
        self._archive_of: dict[str, Archive] = {}
        """By segment."""
        self.damaged_archives: dict[Path, str] = {}
        """Those that cannot be read, and why. What they held is not there."""
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
        self,
        columns: Sequence[str] = EXPERIENCE_COLUMNS,
        *,
        with_archives: bool = True,
        without: Container[BatchPlace] = (),
    ) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        """Every whole batch with its place, archives first, each in order of its place.

        Only the columns asked for are read: a segment is mapped, of an archive the others stay compressed.

        Args:
            without: such as are `damaged`; no other check is made.

        Raises:
            RunError: a batch of an archive cannot be decompressed.
        """
        names = self.segments()  # first, as a segment that is missing here is in an archive by now
        self._list_archives()
        for archive in list(self._archives.values()) if with_archives else []:
            for name in archive.segments:
                yield from archive.batches(name, columns, without)
        for name in (each for each in names if each not in self._archive_of):
            try:
                for place, batch in self._segment(name).batches():
                    if place not in without:
                        yield place, batch.select(columns)
            except FileNotFoundError:  # somebody has compacted the journal meanwhile
                self._list_archives()
                if with_archives and name in self._archive_of:
                    yield from self._archive_of[name].batches(name, columns, without)

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
            raise RunError(f"journal {self.folder} has no segment {place.segment}: {self._why_gone(place)}")
        return self._archive_of[place.segment].batch(place)

    def _why_gone(self, place: BatchPlace) -> str:
        if place.segment in self.deleted_segments():
            return "it was deleted to keep the journal small"
        return "; ".join(["it was lost, or belongs to another run", *self.damaged_archives.values()])

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

    def _segment(self, name: str, *, at_least: int = 0) -> Segment:
        segment = self._open.pop(name, None)
        if segment is None or segment.num_batches < at_least:
            segment = Segment(self.folder / f"{name}{SEGMENT_SUFFIX}")
        self._open[name] = segment
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return segment

    def _list_archives(self) -> None:
        for path in sorted(self.folder.glob(f"*{ARCHIVE_SUFFIX}")):
            if path in self._archives or path in self.damaged_archives:
                continue
            try:
                self._archives[path] = archive = Archive(path)
            except FileNotFoundError:  # somebody has deleted it meanwhile
                continue
            except RunError as error:
                self.damaged_archives[path] = str(error)
                continue
            self._archive_of |= dict.fromkeys(archive.segments, archive)


def read_table(
    run_folder: Path | str, columns: Sequence[str] | None = None, *, check: bool = True
) -> pa.Table:
    """All scored samples of a run, each once, with the learner step that has it in a column `step`.

    Batches and archives that are damaged are left out, with a warning that names them.

    Args:
        run_folder: the run's `run.dir`.
        columns: those of `EXPERIENCE_SCHEMA` to have; None for all.
        check: whether the digest of every batch is checked, which reads all of the journal. Without, only the
            columns that are asked for are read.

    Raises:
        RunError: the folder has no journal, or, unchecked, what is to be read is damaged.
    """
    journal = open_journal(run_folder)
    damaged = set(journal.damaged()) if check else set()
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
    read = [*names, *(key for key in SAMPLE_KEY if key not in names)]
    for place, batch in journal.batches(read, without=damaged):
        batches.append(batch.select(names))
        keys = zip(*(batch[name].to_pylist() for name in SAMPLE_KEY), strict=True)
        for row, key in enumerate(keys):
            step = steps.get((place, row))
            if key not in seen or step is not None:
                seen[key] = len(step_column)  # a second copy counts only if it is the one that was trained
            step_column.append(step)
    _warn_of(damaged, journal)
    schema = pa.schema([EXPERIENCE_SCHEMA.field(name) for name in names])
    table = pa.Table.from_batches([batch.replace_schema_metadata() for batch in batches], schema)
    table = table.append_column("step", pa.array(step_column, pa.int64()))
    return table if len(seen) == len(table) else table.take(np.sort(list(seen.values())))


def _warn_of(damaged: Iterable[BatchPlace], journal: JournalReader) -> None:
    batches = [f"batch {place.batch} of segment {place.segment} is damaged" for place in sorted(damaged)]
    if left_out := [*journal.damaged_archives.values(), *batches]:
        warnings.warn(f"left out of the table of {journal.folder}: {'; '.join(left_out)}", stacklevel=3)


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
