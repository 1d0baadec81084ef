"""What carries snapshots from the learner to the engines, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from rlhf_dist.types import (
    DeviceAddress,
    Probe,
    PublishedWeights,
    SegmentAddress,
    WeightManifest,
)
from rlhf_dist.weights.snapshot import Bucket


class Publisher(Protocol):
    """The learner's end, on rank 0."""

    def publish(
        self, version: int, buckets: Iterable[Bucket], probe: Probe
    ) -> tuple[WeightManifest, SegmentAddress | DeviceAddress]:
        """Write a snapshot. What it returns is small; the bytes stay until two later ones were published.

        Args:
            buckets: as `DeepSpeedEngine.gathered` yields them; exhausted when this returns.
            probe: the learner's log-probabilities of a fixed sequence under these very weights.
        """


class Receiver(Protocol):
    """An engine process's end."""

    def receive(
        self, published: PublishedWeights
    ) -> AbstractContextManager[Iterator[tuple[str, torch.Tensor]]]:
        """The verified tensors by name, readable inside the block.

        Raises:
            WeightsError: on entry, a digest does not match, and nothing was touched; while they come or on
                leaving, the bytes were damaged or overwritten meanwhile, and what was read must not be used.
        """
