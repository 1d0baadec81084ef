"""A weight snapshot: all tensors of a model as one block of bytes, with a manifest that digests each.

The learner's rank 0 writes it, a transport carries it, every rollout worker verifies it before it
touches its model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import TensorEntry, WeightManifest, WeightPayload

ALIGNMENT_BYTES = 64
"""Where a tensor may begin: a cache line, and a multiple of every item size."""
CHUNK_BYTES = 1024 * 1024
"""What is copied at once, and digested while it is still in the core's cache."""

Bucket = Sequence[tuple[tuple[str, ...], torch.Tensor]]
"""Full (gathered) tensors with their Hugging Face names: a tied one has several."""


def snapshot_bytes(tensor_bytes: Iterable[int]) -> int:
    """Bytes of a snapshot of tensors of these sizes."""
    return sum(aligned(size) for size in tensor_bytes)


class SnapshotWriter:
    """Writes a snapshot bucket by bucket: threads copy and digest one while the next is gathered."""

    def __init__(self, target: np.ndarray, threads: Executor) -> None:
        """Begin an empty snapshot.

        Args:
            target: where the bytes go; uint8, of at least `snapshot_bytes`.
            threads: who copies and digests; neither holds Python's lock.
        """
        self._target, self._threads = target, threads
        self._end = 0
        self._under_way: list[tuple[tuple[str, ...], torch.Tensor, int, Future[str]]] = []
        self._written: list[Written] = []

    def add(self, bucket: Bucket) -> None:
        """Wait for the bucket before, then begin to write this one. Its tensors must stay as they are."""
        self._finish_bucket()
        for names, tensor in bucket:
            begin, end = self._end, self._end + tensor.nbytes
            future = self._threads.submit(_copy_and_digest, tensor.detach(), self._target[begin:end])
            self._under_way.append((names, tensor, begin, future))
            self._end = aligned(end)

    def finish(self) -> tuple[TensorEntry, ...]:
        """Wait for the last bucket; what was written, the further names of tied tensors last."""
        self._finish_bucket()
        return tensor_entries(self._written)

    def _finish_bucket(self) -> None:
        self._written += [
            Written(names, tensor.dtype, tensor.shape, begin, future.result())
            for names, tensor, begin, future in self._under_way
        ]
        self._under_way = []


class Written(NamedTuple):
    """A tensor that is in a snapshot."""

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: torch.Size
    begin: int
    digest: str


def tensor_entries(written: Sequence[Written]) -> tuple[TensorEntry, ...]:
    """A manifest's entries, the further names of tied tensors last."""

    def entry(name: str, each: Written) -> TensorEntry:
        dtype_name = str(each.dtype).removeprefix("torch.")
        return TensorEntry(name, dtype_name, tuple(each.shape), each.begin, each.digest)

    first = [entry(each.names[0], each) for each in written]
    return (*first, *(entry(name, each) for each in written for name in each.names[1:]))


def distinct(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """One entry for each tensor that has bytes: tied ones are the same."""
    once: dict[int, TensorEntry] = {}
    for entry in entries:
        if num_bytes_of(entry):
            once.setdefault(entry.offset, entry)
    return list(once.values())


def num_bytes_of(entry: TensorEntry) -> int:
    """Of a tensor."""
    return int(math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize)


def damaged(manifest: WeightManifest, entry: TensorEntry, digest: str) -> WeightsError:
    """The error of a tensor whose bytes are others than the learner's."""
    return WeightsError(
        f"weight snapshot version {manifest.version}: tensor {entry.name} has digest {digest}, "
        f"the learner published {entry.digest}; the bytes were damaged on their way"
    )


def verify(manifest: WeightManifest, payload: WeightPayload) -> None:
    """Check every tensor of a snapshot against its digest, in as many threads as torch has.

    Raises:
        WeightsError: a tensor is cut, or its bytes are not those that the learner digested.
    """
    entries = distinct(manifest.tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(
            lambda entry: xxhash.xxh3_128_hexdigest(_bytes_of(entry, payload).data), entries
        )
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.digest:
                raise damaged(manifest, entry, digest)


def named_tensors(manifest: WeightManifest, payload: WeightPayload) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a snapshot, sharing the payload's (possibly read-only) memory: read, never write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(payload)
    return tensor_views(manifest.tensors, data)


def tensor_views(
    entries: Iterable[TensorEntry], data: torch.Tensor, *, begin: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors that share the memory of a snapshot's bytes.

    Args:
        data: uint8.
        begin: which byte of the snapshot is the first of `data`.
    """
    for entry in entries:
        raw = data[entry.offset - begin : entry.offset - begin + num_bytes_of(entry)]
        yield entry.name, flat(raw).view(getattr(torch, entry.dtype)).view(entry.shape)


def _copy_and_digest(tensor: torch.Tensor, target: np.ndarray) -> str:
    source = flat(tensor.contiguous()).view(torch.uint8)
    hasher = xxhash.xxh3_128()
    for begin in range(0, len(target), CHUNK_BYTES):
        chunk = target[begin : begin + CHUNK_BYTES]
        np.copyto(chunk, source[begin : begin + CHUNK_BYTES].cpu().numpy())
        hasher.update(chunk.data)
    return hasher.hexdigest()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in one dimension; unlike `view(-1)` with stride 1 also where it is empty."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _bytes_of(entry: TensorEntry, payload: WeightPayload) -> np.ndarray:
    return payload[entry.offset : entry.offset + num_bytes_of(entry)]


def aligned(num_bytes: int) -> int:
    """Where the next tensor may begin."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
