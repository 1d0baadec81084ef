"""Snapshots in shared memory: written once a node, mapped by every engine process of that node.

Two segments take turns. Version v + 1 is written while v stays readable, for a worker that joins late; only
v + 2 overwrites v. The driver publishes it once every worker has proved v + 1, so no reader is overtaken; one
that were would find another generation in the segment, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import torch

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe, PublishedWeights, SegmentAddress, WeightManifest, WeightPayload
from rlhf_dist.weights.segment import MappedSegment, Segment
from rlhf_dist.weights.snapshot import Bucket, SnapshotWriter, named_tensors, verify

NUM_SEGMENTS = 2


class SharedMemoryPublisher:
    """A `Publisher` for the engines of this node."""

    def __init__(self, num_bytes: int, *, num_threads: int) -> None:
        """Take the memory of all segments.

        Args:
            num_bytes: of a snapshot, from `snapshot_bytes`.
            num_threads: that copy and digest.

        Raises:
            ResourceError: the node has not enough.
        """
        purpose = f"a weight snapshot of {num_bytes:,} bytes, kept {NUM_SEGMENTS} times,"
        self._segments = [Segment(num_bytes, purpose) for _ in range(NUM_SEGMENTS)]
        self._threads = ThreadPoolExecutor(num_threads)
        self._generation = 0

    def publish(
        self, version: int, buckets: Iterable[Bucket], probe: Probe
    ) -> tuple[WeightManifest, SegmentAddress]:
        """See `Publisher`."""
        self._generation += 1
        segment = self._segments[self._generation % NUM_SEGMENTS]
        segment.begin()
        writer = SnapshotWriter(segment.data, self._threads)
        for bucket in buckets:
            writer.add(bucket)
        manifest = WeightManifest(version, writer.finish(), probe)
        return manifest, segment.commit(self._generation)


class SharedMemoryReceiver:
    """A `Receiver` on the publisher's node; on another it reads the bytes that it is given."""

    def __init__(self, payload: WeightPayload | None = None) -> None:
        """Args: payload: all bytes of the one snapshot, where this process cannot reach the publisher's."""
        self._payload = payload

    @contextmanager
    def receive(self, published: PublishedWeights) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """See `Receiver`."""
        if self._payload is not None:
            verify(published.manifest, self._payload)
            yield named_tensors(published.manifest, self._payload)
            return
        address = published.segment
        assert isinstance(address, SegmentAddress)
        segment = attach(address)
        if segment is None:
            raise WeightsError(
                f"weight snapshot version {published.manifest.version} cannot be opened at "
                f"{address.path}: the learner that wrote it has ended, or is on another node"
            )
        segment.check(published)
        verify(published.manifest, segment.data)
        yield named_tensors(published.manifest, segment.data)
        segment.check(published)


def attach(address: SegmentAddress) -> MappedSegment | None:
    """The segment, mapped into this process, where it stays for the next snapshots; None out of reach."""
    try:
        return _attached(address.path, address.token, address.num_bytes)
    except OSError:
        return None


@lru_cache(maxsize=NUM_SEGMENTS)
def _attached(path: str, token: str, num_bytes: int) -> MappedSegment:
    return MappedSegment(SegmentAddress(path, token, generation=0, num_bytes=num_bytes))
