"""Which worker generates which prompt: always the one with the fewest tokens still to come."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class WorkerLoad(NamedTuple):
    """What a rollout worker has to do."""

    worker: int
    """Its index."""
    num_tokens: int
    """That may still come, of all its prompts."""
    tokens_per_prompt: int
    """That one more prompt would add."""
    room: int
    """Prompts more that it takes."""


def assign(ordinals: Sequence[int], loads: Sequence[WorkerLoad]) -> dict[int, list[int]]:
    """The ordinals of each worker, by its index; each in turn to the one with the fewest tokens to come.

    Raises:
        ValueError: there are more ordinals than room.
    """
    if len(ordinals) > sum(load.room for load in loads):
        raise ValueError(f"{len(ordinals)} prompts for workers with less room: {loads}")
    heap = [(load.num_tokens, load.worker, load) for load in loads if load.room > 0]
    heapq.heapify(heap)
    assigned: dict[int, list[int]] = {}
    for ordinal in ordinals:
        num_tokens, worker, load = heapq.heappop(heap)
        assigned.setdefault(worker, []).append(ordinal)
        if len(assigned[worker]) < load.room:
            heapq.heappush(heap, (num_tokens + load.tokens_per_prompt, worker, load))
    return assigned
