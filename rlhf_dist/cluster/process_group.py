"""A torch process group whose ranks are Ray actors."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from rlhf_dist.cluster.imports import without_garbage_collection
from rlhf_dist.cluster.liveness import Worker

if TYPE_CHECKING:
    from rlhf_dist.engines.settings import LearnerSettings


LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
NUM_PORTS, NUM_TRIES = 10_000, 1000


def free_port() -> int:
    """A port of this node that stays free: below those that the kernel hands to whoever asks for any.

    The ranks import for seconds before rank 0 listens there.

    Raises:
        OSError: none was found.
    """
    end = int(LOCAL_PORTS.read_text().split()[0])
    dice = random.SystemRandom()  # the seed of a run must not give all its groups one port
    for _ in range(NUM_TRIES):
        port = dice.randrange(max(1024, end - NUM_PORTS), end)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port below {end} was found in {NUM_TRIES} tries")


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a group meet: rank 0's address and a free port there."""

    host: str
    port: int


class RankWorker(Worker):
    """What every actor that is a rank has."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks

    def open_rendezvous(self) -> Rendezvous:
        """Rank 0 only: where the group will meet."""
        return Rendezvous(ray.util.get_node_ip_address(), free_port())

    def _join(self, rendezvous: Rendezvous, settings: LearnerSettings, timeout_s: float) -> None:
        """Join the group; `timeout_s` is the deadline of each later collective."""
        with without_garbage_collection():
            from rlhf_dist.engines.collectives import join_group

        join_group(
            rendezvous.host,
            rendezvous.port,
            rank=self._rank,
            num_ranks=self._num_ranks,
            on_gpu=settings.gpus_per_worker > 0,
            timeout_s=timeout_s,
        )
