"""The actors around the queue in `bench queue`: what writes experience, and what reads it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.bench.queue_figures import Reading
from rlhf_dist.cluster.liveness import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from rlhf_dist.cluster.experience_queue import LeasedBatch
    from rlhf_dist.types import BatchInfo

NUM_TEMPLATES = 4
"""Different batches of a producer, which it sends by turns with new ordinals."""
READ_TIMEOUT_S = 60


class Producer(Worker):
    """Stands for a scoring worker from where it has scored a batch."""

    def __init__(self, name: str, journal: Path, *, segment_bytes: int) -> None:
        self._name, self._journal, self._segment_bytes = name, journal, segment_bytes
        self._num_produced, self._draw = 0, random.Random(name)

    def start(self, samples_per_batch: int, response_tokens: int) -> None:
        """Make the batches that will be sent."""
        from rlhf_dist.bench.synthetic import experience_batch
        from rlhf_dist.experience.journal import JournalWriter

        self._writer = JournalWriter(self._journal, self._name, max_segment_bytes=self._segment_bytes)
        self._templates = [
            experience_batch(samples_per_batch, response_tokens=response_tokens, seed=seed)
            for seed in range(NUM_TEMPLATES)
        ]

    def produce(self, ordinals: Sequence[int], version: int) -> tuple[pa.RecordBatch, BatchInfo]:
        """A batch of these prompts, which is in the journal when this returns."""
        from rlhf_dist.bench.synthetic import renamed
        from rlhf_dist.experience.schema import batch_info

        finished = self._draw.sample(ordinals, len(ordinals))  # some responses are done before others
        batch = renamed(self._templates[self._num_produced % NUM_TEMPLATES], finished, version)
        self._num_produced += 1
        return batch, batch_info(batch, self._writer.append(batch))


class Reader(Worker):
    """Stands for a learner rank up to where its step begins."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal

    def start(self) -> None:
        """Import what reading needs."""
        from rlhf_dist.experience import samples

        del samples

    def read(self, batches: list[LeasedBatch]) -> int:
        """Read a step's samples; returns the bytes of the batches."""
        from rlhf_dist.experience.samples import Samples

        leased = self._leased(batches)
        Samples.from_batches(leased)
        return sum(batch.nbytes for batch in leased)

    def compare(self, batches: list[LeasedBatch], repeats: int) -> list[Reading]:
        """Read the same samples again and again, and in between copy as many bytes."""
        import numpy as np

        from rlhf_dist.experience.samples import Samples

        source = np.ones(self.read(batches), np.uint8)
        readings = []
        for _ in range(repeats):
            began = time.perf_counter()
            leased = self._leased(batches)
            fetched = time.perf_counter()
            Samples.from_batches(leased)
            built = time.perf_counter()
            source.copy()
            copied = time.perf_counter()
            readings.append(Reading(source.nbytes, fetched - began, built - fetched, copied - built))
        return readings

    def _leased(self, batches: list[LeasedBatch]) -> list[pa.RecordBatch]:
        from rlhf_dist.cluster.learner_worker import read_leased

        return read_leased(batches, self._journal, timeout_s=READ_TIMEOUT_S)
