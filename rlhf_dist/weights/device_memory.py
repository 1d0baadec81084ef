"""Snapshots in the learner's GPU memory: mapped by engines on the same GPU, sent to those on others.

As in shared memory (`weights.shared_memory`) two segments take turns, and the first bytes of each say which
of its contents it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rlhf_dist.errors import ResourceError, WeightsError
from rlhf_dist.types import (
    DeviceAddress,
    Probe,
    PublishedWeights,
    TensorEntry,
    WeightManifest,
)
from rlhf_dist.weights.device_digest import hex_digests, word_sums
from rlhf_dist.weights.device_leftovers import remove_at_the_end
from rlhf_dist.weights.shared_memory import NUM_SEGMENTS
from rlhf_dist.weights.snapshot import (
    ALIGNMENT_BYTES,
    Bucket,
    Written,
    aligned,
    damaged,
    distinct,
    flat,
    num_bytes_of,
    tensor_entries,
    tensor_views,
)

HEADER_BYTES = ALIGNMENT_BYTES
WRITING = 0
DEVICE_INDEX = 6
"""Which of torch's arguments for mapping a tensor is its device, as this process counts them."""
GB = 1e9


class DevicePublisher:
    """A `Publisher` for engines on GPUs."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Take the memory of all segments.

        Raises:
            ResourceError: the GPU has not enough.
        """
        try:
            self._segments = [_DeviceSegment(num_bytes, device) for _ in range(NUM_SEGMENTS)]
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{NUM_SEGMENTS} weight snapshots of {num_bytes / GB:.2f} GB each find no room in the memory "
                "of the learner's GPU; keep them in the node's memory (weights.transport=shared_memory), or "
                "give the learner more GPUs or a higher zero_stage"
            ) from error
        if gpu_uuid(device):
            remove_at_the_end()
        self._generation = 0

    def publish(
        self, version: int, buckets: Iterable[Bucket], probe: Probe
    ) -> tuple[WeightManifest, DeviceAddress]:
        """See `Publisher`."""
        self._generation += 1
        segment = self._segments[self._generation % NUM_SEGMENTS]
        segment.begin()
        spans: list[tuple[tuple[str, ...], torch.dtype, torch.Size, int]] = []
        sums: list[torch.Tensor] = []
        end = 0
        for bucket in buckets:
            for names, tensor in bucket:
                source = flat(tensor.detach().contiguous()).view(torch.uint8)
                segment.data[end : end + tensor.nbytes].copy_(source)
                sums.append(word_sums(tensor))
                spans.append((names, tensor.dtype, tensor.shape, end))
                end = aligned(end + tensor.nbytes)
        digests = hex_digests(sums)
        entries = tensor_entries(
            [Written(*span, digest) for span, digest in zip(spans, digests, strict=True)]
        )
        return WeightManifest(version, entries, probe), segment.commit(self._generation)

    def contents(self, generation: int) -> torch.Tensor:
        """All bytes of a snapshot that is still there.

        Raises:
            WeightsError: it has been overwritten.
        """
        segment = self._segments[generation % NUM_SEGMENTS]
        _check(segment.header, generation)
        return segment.data


class DeviceReceiver:
    """A `Receiver` on the learner's GPU."""

    @contextmanager
    def receive(self, published: PublishedWeights) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """See `Receiver`."""
        address, manifest = published.segment, published.manifest
        assert isinstance(address, DeviceAddress)
        header, data = _split(_mapped(address.handle))
        _check(header, address.generation)
        verify_on_device(manifest, distinct(manifest.tensors), data)
        yield tensor_views(manifest.tensors, data)
        torch.accelerator.synchronize()
        _check(header, address.generation)


def verify_on_device(
    manifest: WeightManifest, entries: Sequence[TensorEntry], data: torch.Tensor, *, begin: int = 0
) -> None:
    """Check tensors against their digests where they are.

    Args:
        data: uint8.
        begin: which byte of the snapshot is the first of `data`.

    Raises:
        WeightsError: the bytes of one are not those that the learner digested.
    """
    digests = hex_digests([word_sums(tensor) for _, tensor in tensor_views(entries, data, begin=begin)])
    for entry, digest in zip(entries, digests, strict=True):
        if digest != entry.digest:
            raise damaged(manifest, entry, digest)


def pieces(manifest: WeightManifest, num_bytes: int) -> Iterator[tuple[int, int, list[TensorEntry]]]:
    """A snapshot cut into spans of at most so many bytes, a larger tensor alone.

    Yields:
        First byte, end, and the entries that are inside, tied ones under each name.
    """
    inside: list[TensorEntry] = []
    begin = end = 0
    for entry in sorted(manifest.tensors, key=lambda entry: entry.offset):
        entry_end = entry.offset + num_bytes_of(entry)
        if inside and entry.offset >= end and entry_end - begin > num_bytes:
            yield begin, end, inside
            inside, begin = [], entry.offset
        inside.append(entry)
        end = max(end, entry_end)
    if inside:
        yield begin, end, inside


def gpu_uuid(device: torch.device) -> str:
    """What tells a GPU from all others; empty for what is none."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class _DeviceSegment:
    """The owner's side: room for `num_bytes`."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = torch.zeros(HEADER_BYTES + num_bytes, dtype=torch.uint8, device=device)
        self.header, self.data = _split(self._memory)
        self._gpu = gpu_uuid(device)
        self._handle: tuple[Any, ...] = reduce_tensor(self._memory)[1] if self._gpu else ()

    def begin(self) -> None:
        """The contents are about to change: whoever reads them can tell."""
        self.header.fill_(WRITING)

    def commit(self, generation: int) -> DeviceAddress:
        """The contents are complete; returns what others need to read them."""
        self.header.fill_(generation)
        if self._gpu:
            torch.cuda.synchronize(self._memory.device)
        return DeviceAddress(self._gpu, self._handle, generation, self.data.numel())


def _split(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Header, as one int64, and contents."""
    return memory[: torch.int64.itemsize].view(torch.int64), memory[HEADER_BYTES:]


def _check(header: torch.Tensor, generation: int) -> None:
    if int(header) != generation:
        raise WeightsError(
            "a weight snapshot was overwritten while it was to be read: the learner has begun a later one in "
            "the same memory; this worker is too slow, or was told too late"
        )


@lru_cache(maxsize=NUM_SEGMENTS)
def _mapped(handle: tuple[Any, ...]) -> torch.Tensor:
    """The owner's memory, mapped into this process, where it stays for the next snapshots."""
    arguments = list(handle)
    arguments[DEVICE_INDEX] = torch.accelerator.current_device_index()
    return rebuild_cuda_tensor(*arguments)
