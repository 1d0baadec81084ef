"""A weight snapshot: named tensors as raw bytes, with a manifest that names and digests each.

The learner's rank 0 takes it, the object store carries it (once a node, shared memory on the node),
every rollout worker verifies it before it loads anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xxhash

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe, TensorEntry, WeightManifest, WeightPayload


def take_snapshot(
    version: int, tensors: Iterable[tuple[str, torch.Tensor]], probe: Probe
) -> tuple[WeightManifest, WeightPayload]:
    """Copy the tensors to host memory as bytes and digest each.

    Args:
        version: the policy version of these weights.
        tensors: full (gathered) tensors under their Hugging Face names, tied ones included.
        probe: the learner's log-probabilities of a fixed sequence under these very weights.
    """
    entries: list[TensorEntry] = []
    payload: WeightPayload = []
    for name, tensor in tensors:
        raw = _raw_bytes(tensor)
        entries.append(TensorEntry(name, _dtype_name(tensor.dtype), tuple(tensor.shape), _digest(raw)))
        payload.append(raw)
    return WeightManifest(version, tuple(entries), probe), payload


def verify(manifest: WeightManifest, payload: WeightPayload) -> None:
    """Check every tensor of a snapshot against its digest.

    Raises:
        WeightsError: a tensor is missing, or its bytes are not those that the learner digested.
    """
    if len(payload) != len(manifest.tensors):
        raise WeightsError(
            f"weight snapshot version {manifest.version} holds {len(payload)} tensors, "
            f"its manifest names {len(manifest.tensors)}"
        )
    for entry, raw in zip(manifest.tensors, payload, strict=True):
        digest = _digest(raw)
        if digest != entry.digest:
            raise WeightsError(
                f"weight snapshot version {manifest.version}: tensor {entry.name} has digest {digest}, "
                f"the learner published {entry.digest}; the bytes were damaged on their way"
            )


def named_tensors(manifest: WeightManifest, payload: WeightPayload) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a snapshot, sharing the payload's (possibly read-only) memory: read, never write."""
    for entry, raw in zip(manifest.tensors, payload, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(raw, dtype=getattr(torch, entry.dtype))
        yield entry.name, flat.view(entry.shape)


def _raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().to("cpu", copy=True).contiguous()
    return host.view(-1).view(torch.uint8).numpy()


def _digest(raw: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(raw.data)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
