"""An archive of the journal: segments merged into one compressed Arrow IPC file."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from rlhf_dist.durable import sync_folder
from rlhf_dist.errors import RunError
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, check_schema
from rlhf_dist.experience.segments import DIGEST_KEY, Segment, batch_digest
from rlhf_dist.types import BatchPlace

ARCHIVE_SUFFIX = ".arrow"
SEGMENTS_KEY = b"rlhf_dist.segments"


class Archive:
    """A file of merged segments."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            FileNotFoundError: it is not there.
            RunError: it is damaged, or has another schema version.
        """
        self._path = path
        self._map = pa.memory_map(str(path))
        self.segments: dict[str, range] = {}
        """Numbers of each one's batches in the file."""
        try:
            self._file = pa.ipc.open_file(self._map)
            contents = json.loads(self._file.metadata[SEGMENTS_KEY])
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"archive {path} is damaged ({error})") from error
        check_schema(self._file.schema, EXPERIENCE_SCHEMA)
        start = 0
        for name, num_batches in contents:
            self.segments[name] = range(start, start + num_batches)
            start += num_batches

    def batches(
        self, segment: str, columns: Sequence[str], without: Container[BatchPlace]
    ) -> Iterator[tuple[BatchPlace, pa.RecordBatch]]:
        """A segment's batches with their places, unchecked; only these columns are decompressed.

        Raises:
            RunError: one cannot be decompressed.
        """
        indices = [EXPERIENCE_SCHEMA.names.index(name) for name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=sorted(indices))
        file = pa.ipc.open_file(self._map, options=options)
        for place, number in enumerate(self.segments[segment]):
            if BatchPlace(segment, place) not in without:
                try:
                    batch = file.get_batch(number)
                except (pa.ArrowInvalid, OSError) as error:
                    raise self._damaged(BatchPlace(segment, place)) from error
                yield BatchPlace(segment, place), batch.select(columns)

    def batch(self, place: BatchPlace) -> pa.RecordBatch:
        """One of them, checked. Raises RunError where it is not there, or damaged."""
        numbers = self.segments[place.segment]
        if place.batch >= len(numbers):
            raise RunError(f"segment {place.segment} in {self._path} has no batch {place.batch}")
        if (batch := self._whole_batch(numbers[place.batch])) is None:
            raise self._damaged(place)
        return batch

    def damaged(self, segment: str) -> list[BatchPlace]:
        """Batches of a segment that are no longer as they were written."""
        numbers = enumerate(self.segments[segment])
        return [BatchPlace(segment, place) for place, number in numbers if self._whole_batch(number) is None]

    def _damaged(self, place: BatchPlace) -> RunError:
        return RunError(f"batch {place.batch} of segment {place.segment} in {self._path} is damaged")

    def _whole_batch(self, number: int) -> pa.RecordBatch | None:
        """None where it cannot be decompressed, or is not what was."""
        try:
            batch, metadata = self._file.get_batch_with_custom_metadata(number)
        except (pa.ArrowInvalid, OSError):
            return None
        return batch if metadata is not None and metadata.get(DIGEST_KEY) == batch_digest(batch) else None


def write_archive(path: Path, segments: Sequence[Segment]) -> None:
    """Merge segments, which keep their names, into a compressed file; on disk when this returns.

    The file appears whole: it is written beside, synced and renamed. Nothing is left of it when this raises.

    Raises:
        RunError: a batch is damaged.
        OSError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            _write_batches(file, segments)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _write_batches(file: BinaryIO, segments: Sequence[Segment]) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    contents = [(segment.name, segment.num_batches) for segment in segments]
    metadata = {SEGMENTS_KEY: json.dumps(contents).encode()}
    with pa.ipc.new_file(file, EXPERIENCE_SCHEMA, options=options, metadata=metadata) as writer:
        for segment in segments:
            for number in range(segment.num_batches):
                batch = segment.checked_batch(number)
                writer.write_batch(batch, custom_metadata={DIGEST_KEY: batch_digest(batch)})
