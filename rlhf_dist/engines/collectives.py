"""Joining and leaving the learner's process group, and the collectives it needs besides DeepSpeed's own."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


def join_group(host: str, port: int, *, rank: int, num_ranks: int, on_gpu: bool, timeout_s: float) -> None:
    """Join this process to the group that meets at rank 0's address. Every rank calls.

    Args:
        timeout_s: deadline of each later collective.
    """
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": "0",  # Ray shows each worker its own GPUs only
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    # Used by DeepSpeed's inference only; compiling it at the first start would need a compiler and a minute,
    # and a start killed meanwhile would leave a lock that every later one waits for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
        rank=rank,
        world_size=num_ranks,
    )


def leave_group() -> None:
    """Leave the group when every rank is about to, and before the process ends by itself. Every rank calls.

    Without it a rank that is done first takes its connections away, and rank 0 the group's store, while
    others may be in their last collective; and the group's threads run while the interpreter is taken down.
    """
    dist.barrier()
    dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum of every rank's tensor, on the CPU. All ranks pass the same shape."""
    total = tensor.to(device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.cpu()


def from_rank_0(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's tensor on every rank, on the CPU. All ranks pass the same shape."""
    shared = tensor.to(device, copy=True)
    dist.broadcast(shared, src=0)
    return shared.cpu()


class GroupMetrics:
    """Scalars that arrive micro-batch by micro-batch on every rank, combined over all of them.

    A name that ends in `_max` or `_min` is an extreme, every other one a mean weighted by tokens.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, dict[str, float]]] = []

    def add(self, stats: dict[str, torch.Tensor], num_tokens: int) -> None:
        """Count one piece. Pieces without tokens say nothing."""
        if num_tokens > 0:
            self._pieces.append((num_tokens, {name: float(value) for name, value in stats.items()}))

    def reduce(self) -> dict[str, float]:
        """Every metric over all ranks, the same on each. A collective."""
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, self._pieces)
        pieces = [piece for rank in by_rank for piece in rank]
        names = sorted({name for _, stats in pieces for name in stats})
        return {
            name: _combine(name, [(n, stats[name]) for n, stats in pieces if name in stats]) for name in names
        }


def _combine(name: str, weighted: list[tuple[int, float]]) -> float:
    if name.endswith("_max"):
        return max(value for _, value in weighted)
    if name.endswith("_min"):
        return min(value for _, value in weighted)
    return sum(count * value for count, value in weighted) / sum(count for count, _ in weighted)
