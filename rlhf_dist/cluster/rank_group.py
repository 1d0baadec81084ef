"""Actors that are the ranks of one torch process group, called as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_dist.cluster.calls import Call, wait_for
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.process_group import RankWorker
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import ClusterSettings


class RankGroup:
    """All ranks get the same calls, since collectives run inside them."""

    def __init__(self, worker_class: type[RankWorker], share: RoleShare, cluster: ClusterSettings) -> None:
        self.cluster = cluster
        self.workers = Workers(
            worker_class,
            share,
            placement_timeout_s=cluster.placement_timeout_s,
            arguments=lambda rank: ((rank, share.num_workers), {}),
        )

    def start(self, *args: Any, **kwargs: Any) -> list[Call]:
        """Have the ranks meet and begin to load; wait for the calls to know that they did."""
        meeting = self.workers.call(0, "open_rendezvous", action="open a rendezvous")
        rendezvous = wait_for(meeting, self.cluster.start_timeout_s)
        kwargs["collective_timeout_s"] = self.cluster.step_timeout_s
        return self.workers.start(rendezvous, *args, action="load its models", **kwargs)

    def export_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer."""
        self.workers.call_all(
            "export_policy",
            folder,
            action="export the policy",
            timeout_s=self.cluster.checkpoint_timeout_s,
        )

    def end(self) -> None:
        """Kill the ranks."""
        self.workers.end()
