"""What the measurements around the queue come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A step's samples read once."""

    num_bytes: int
    """Of the batches."""
    fetch_s: float
    """From leased references to Arrow batches in this process."""
    build_s: float
    """From there to the learner's arrays."""
    memcpy_s: float
    """A plain copy of as many bytes, into new memory as well."""


@dataclass(frozen=True)
class Speeds:
    """Bytes a second, medians of several readings of the same samples."""

    read: float
    """Fetched and built."""
    memcpy: float

    @property
    def ratio(self) -> float:
        """1: as fast as a copy."""
        return self.read / self.memcpy


@dataclass(frozen=True)
class Memory:
    """Resident bytes at one moment."""

    at_s: float
    """Since the measurement began."""
    queue: int
    """The queue's actor."""
    driver: int
    """This process."""


@dataclass(frozen=True)
class Window:
    """What went through the queue in some time."""

    seconds: float
    num_samples: int
    num_bytes: int
    num_puts: int
    put_s: float
    """All puts together, from the call until there was room."""
    memory: tuple[Memory, ...]
    """In order of time; the first and the last are of the window's ends."""

    @property
    def samples_per_s(self) -> float:
        """Trained samples a second."""
        return self.num_samples / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Their bytes a second."""
        return self.num_bytes / self.seconds

    @property
    def mean_put_s(self) -> float:
        """How long a producer's batch waited; long: there was backpressure."""
        return self.put_s / max(self.num_puts, 1)


def speeds(readings: Sequence[Reading]) -> Speeds:
    """Medians."""
    return Speeds(
        read=statistics.median(each.num_bytes / (each.fetch_s + each.build_s) for each in readings),
        memcpy=statistics.median(each.num_bytes / each.memcpy_s for each in readings),
    )


def growth(memory: Sequence[Memory], *, warm_up_s: float) -> tuple[int, int]:
    """(queue actor, driver): bytes at most, less what there was after the warm-up.

    Raises:
        ValueError: nothing was measured after it.
    """
    later = [each for each in memory if each.at_s >= warm_up_s]
    if not later:
        raise ValueError(f"no measurement {warm_up_s:g} s after the beginning or later")
    return (
        max(each.queue for each in later) - later[0].queue,
        max(each.driver for each in later) - later[0].driver,
    )
