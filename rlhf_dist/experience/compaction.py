"""Keeps the journal small: merges segments that are done with into compressed archives, deletes the oldest.

Every step leaves a journal that reads the same, whenever a crash comes: an archive appears whole by a rename,
and only then its segments are deleted. Until they are, the reader takes the archive's copy; what a crash left
to delete, the next compaction deletes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rlhf_dist.durable import JsonLinesLog, Record, sync_folder
from rlhf_dist.errors import RunError, StorageError
from rlhf_dist.experience.archives import ARCHIVE_SUFFIX, write_archive
from rlhf_dist.experience.journal import DELETED_FILE, JournalReader
from rlhf_dist.experience.ordinals import Ordinals
from rlhf_dist.experience.segments import SEGMENT_SUFFIX, Segment, segment_numbers
from rlhf_dist.types import BatchPlace

ARCHIVE_BYTES = 256 * 1024**2
"""Of the segments that are merged into one archive, at least: few files, each soon read."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did."""

    segments_archived: list[str]
    archives_deleted: list[str]
    problem: str | None = None
    """What could not be done and why, in a sentence; the files that it is about are as they were."""


def compact(
    folder: Path,
    done: Ordinals,
    *,
    max_bytes: int | None = None,
    archive_bytes: int = ARCHIVE_BYTES,
) -> Compaction:
    """Merge the segments all of whose prompts are done with.

    Others may write and read meanwhile; only one may compact at a time. What cannot be done is told, not
    raised: a journal that is larger than it need be holds nobody up.

    Args:
        folder: of the journal.
        done: ordinals of prompts that were given up, or trained in a step before the first one that some
            checkpoint may have to be repeated from. Nothing of any other one is touched.
        max_bytes: while the journal is larger, its oldest archive is deleted; None: nothing is.
        archive_bytes: segments that together have less wait for the next time.
    """
    archived: list[str] = []
    deleted: list[str] = []
    problems: list[str] = []
    if max_bytes is not None:
        archive_bytes = min(archive_bytes, max_bytes // 4)
    with _told(problems):
        _check_archives(folder)
        _clean_up(folder)
        finished = _finished_segments(folder, done, problems)
        for segments in _groups(folder, finished, archive_bytes):
            write_archive(_next_archive(folder), [Segment(_path(folder, name)) for name in segments])
            archived += segments
            _clean_up(folder)
    if max_bytes is not None:
        with _told(problems):  # also where nothing could be merged, as the disk may be full
            deleted = _delete_oldest(folder, max_bytes)
    return Compaction(archived, deleted, _sentence(folder, problems))


@contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    """Note what goes wrong in the block, and go on behind it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        problems.append(f"{error.filename}: {reason}" if error.filename else reason)
    except (RunError, pa.ArrowException) as error:
        problems.append(str(error))


def _sentence(folder: Path, problems: list[str]) -> str | None:
    if not problems:
        return None
    reasons = "; ".join(dict.fromkeys(problems))
    return f"journal {folder} was not wholly compacted, and takes more room than it need: {reasons}"


def _check_archives(folder: Path) -> None:
    """Raises RunError: one is damaged, so that nobody knows which segments it holds."""
    for damage in JournalReader(folder).damaged_archives.values():
        raise RunError(f"{damage}; bring it back from a copy, or delete it with the samples that it held")


def _clean_up(folder: Path) -> None:
    """Delete what a crash left half-written, and segments that an archive holds."""
    unlisted = {path.stem for path in folder.glob(f"*{SEGMENT_SUFFIX}")} - set(
        JournalReader(folder).segments()
    )
    leftovers = [_path(folder, name) for name in sorted(unlisted)]
    for path in [*folder.glob(f"*{ARCHIVE_SUFFIX}.tmp"), *leftovers]:
        os.unlink(path)
    sync_folder(folder)


def _finished_segments(folder: Path, done: Ordinals, problems: list[str]) -> Iterator[str]:
    """In order. Never the last one of a producer: the numbers of its next ones follow from it.

    One with a damaged batch is a problem of its own, so that it does not keep others from being merged.
    """
    last = {f"{producer}-{max(numbers):06d}" for producer, numbers in segment_numbers(folder).items()}
    journal = JournalReader(folder)
    for name in journal.segments():
        if name not in last and not _is_open(_path(folder, name)):
            finished = False
            with _told(problems):
                finished = all(ordinal in done for ordinal in _ordinals(journal, name))
            if finished:
                yield name


def _ordinals(journal: JournalReader, segment: str) -> set[int]:
    """Of all its batches, each of which is checked."""
    places = [BatchPlace(segment, number) for number in range(journal.num_batches(segment))]
    return {ordinal for place in places for ordinal in journal.read(place)["ordinal"].to_pylist()}


def _is_open(path: Path) -> bool:
    """Whether its writer lives, or that cannot be told; one that has let go never writes it again."""
    try:
        with path.open("r+b") as file:  # NFS gives an exclusive lock to those only who may write
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _groups(folder: Path, segments: Iterator[str], archive_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in segments:
        group.append(name)
        size += _path(folder, name).stat().st_size
        if size >= archive_bytes:
            yield group
            group, size = [], 0


def _path(folder: Path, segment: str) -> Path:
    return folder / f"{segment}{SEGMENT_SUFFIX}"


def _next_archive(folder: Path) -> Path:
    numbers = [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"*{ARCHIVE_SUFFIX}")]
    return folder / f"archive-{max(numbers, default=0) + 1:06d}{ARCHIVE_SUFFIX}"


def _delete_oldest(folder: Path, max_bytes: int) -> list[str]:
    journal = JournalReader(folder)
    surplus: dict[Path, list[str]] = {}
    num_bytes = journal.num_bytes()
    for path, segments in journal.archives().items():
        if num_bytes <= max_bytes:
            break
        num_bytes -= path.stat().st_size
        surplus[path] = segments
    if surplus:
        _delete(folder, surplus)
    return [path.name for path in surplus]


def _delete(folder: Path, surplus: Mapping[Path, Sequence[str]]) -> None:
    """Delete archives, and write down whose samples are gone: before, so that no crash leaves a riddle."""
    records = [{"archive": path.name, "segments": list(segments)} for path, segments in surplus.items()]
    try:
        _write_down(folder, records)
        is_written = True
    except StorageError:  # on a full disk only what is deleted makes room
        is_written = False
    for path in surplus:
        os.unlink(path)
    sync_folder(folder)
    if not is_written:
        _write_down(folder, records)


def _write_down(folder: Path, records: Sequence[Record]) -> None:
    log = JsonLinesLog(folder / DELETED_FILE)
    try:
        log.append(records)
    finally:
        log.close()
