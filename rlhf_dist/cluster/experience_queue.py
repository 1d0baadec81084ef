"""The bounded queue between scoring and the learner.

It holds references and counts, never the experience itself: batches stay in the object store until
their lease is acknowledged. A full queue makes the producer wait; nothing is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_dist.cluster.calls import Call, wait_for
from rlhf_dist.types import BatchInfo


@dataclass(frozen=True)
class Lease:
    """Batches on loan to a learner step. They are gone from the queue only once acknowledged."""

    lease_id: int
    batches: list[ray.ObjectRef]
    num_samples: int


class ExperienceQueue:
    """An asyncio actor: a waiting `put` or `lease` blocks nobody else."""

    def __init__(self, *, max_samples: int, max_bytes: int) -> None:
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._waiting: deque[tuple[ray.ObjectRef, BatchInfo]] = deque()
        self._leased: dict[int, list[tuple[ray.ObjectRef, BatchInfo]]] = {}
        self._num_leases = 0
        self._changed = asyncio.Condition()

    async def put(self, batch: list[ray.ObjectRef], info: BatchInfo) -> None:
        """Add one scored batch, wrapped in a list so that only its reference travels; waits for room."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(info))
            self._waiting.append((batch[0], info))
            self._changed.notify_all()

    async def lease(self, num_samples: int) -> Lease:
        """The oldest batches that together hold at least `num_samples`; waits until they are there."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._samples_waiting() >= num_samples)
            batches, leased_samples = [], 0
            while leased_samples < num_samples:
                batches.append(self._waiting.popleft())
                leased_samples += batches[-1][1].num_samples
            self._num_leases += 1
            self._leased[self._num_leases] = batches
            return Lease(self._num_leases, [ref for ref, _ in batches], leased_samples)

    async def acknowledge(self, lease_id: int) -> None:
        """The learner has trained on a lease: forget its batches."""
        async with self._changed:
            del self._leased[lease_id]
            self._changed.notify_all()

    def _samples_waiting(self) -> int:
        return sum(info.num_samples for _, info in self._waiting)

    def _has_room(self, info: BatchInfo) -> bool:
        held = list(self._waiting) + [entry for batches in self._leased.values() for entry in batches]
        if not held:
            return True  # a batch larger than the limits still has to pass, alone
        samples = sum(other.num_samples for _, other in held) + info.num_samples
        num_bytes = sum(other.num_bytes for _, other in held) + info.num_bytes
        return samples <= self._max_samples and num_bytes <= self._max_bytes


class QueueClient:
    """The driver's end of the queue actor."""

    def __init__(self, *, max_samples: int, max_bytes: int, timeout_s: float) -> None:
        """Start the actor.

        Args:
            timeout_s: deadline of every call.
        """
        self._timeout_s = timeout_s
        actor_class = ray.remote(ExperienceQueue).options(num_cpus=0, max_restarts=0)
        self._actor = actor_class.remote(max_samples=max_samples, max_bytes=max_bytes)

    def put(self, batch: ray.ObjectRef, info: BatchInfo) -> None:
        """Add one batch by reference; waits for room."""
        self._wait(self._actor.put.remote([batch], info), f"take {info.num_samples} samples (is it full?)")

    def lease(self, num_samples: int) -> Lease:
        """The oldest batches that together hold at least `num_samples`; waits for them."""
        return self._wait(self._actor.lease.remote(num_samples), f"lease {num_samples} samples")

    def acknowledge(self, lease: Lease) -> None:
        """The learner has trained on a lease."""
        self._wait(self._actor.acknowledge.remote(lease.lease_id), "acknowledge a lease")

    def end(self) -> None:
        """Kill the actor."""
        ray.kill(self._actor, no_restart=True)

    def _wait(self, ref: ray.ObjectRef, action: str) -> Any:
        return wait_for(Call(ref, "experience queue", action), self._timeout_s)
