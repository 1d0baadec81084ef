"""A torch process group whose ranks are Ray actors."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    from rlhf_dist.engines.settings import LearnerSettings


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a group meet: rank 0's address and a free port there."""

    host: str
    port: int


class RankWorker:
    """What every actor that is a rank has."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks

    def open_rendezvous(self) -> Rendezvous:
        """Rank 0 only: where the group will meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return Rendezvous(ray.util.get_node_ip_address(), probe.getsockname()[1])

    def _join(self, rendezvous: Rendezvous, settings: LearnerSettings, timeout_s: float) -> None:
        """Join the group; `timeout_s` is the deadline of each later collective."""
        from rlhf_dist.engines.collectives import join_group

        join_group(
            rendezvous.host,
            rendezvous.port,
            rank=self._rank,
            num_ranks=self._num_ranks,
            on_gpu=settings.gpus_per_worker > 0,
            timeout_s=timeout_s,
        )
