"""All learner ranks as one learner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray

from rlhf_dist.cluster.calls import Call, wait_for_all
from rlhf_dist.cluster.learner_worker import LearnerWorker
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.rank_group import RankGroup
from rlhf_dist.config import ClusterSettings
from rlhf_dist.types import WeightManifest


class LearnerGroup(RankGroup):
    """Consumes references to experience batches, produces weight snapshots."""

    def __init__(self, share: RoleShare, cluster: ClusterSettings) -> None:
        """Create the ranks."""
        super().__init__(LearnerWorker, share, cluster)

    def step(self, batches: list[ray.ObjectRef], step: int, temperature: float) -> dict[str, float]:
        """One learner step on every rank; the metrics are the same on each."""
        return self.workers.call_all(
            "step",
            batches,
            step,
            temperature,
            action=f"do learner step {step}",
            timeout_s=self.cluster.step_timeout_s,
        )[0]

    def publish(self, version: int, probe_tokens: Sequence[int]) -> tuple[WeightManifest, ray.ObjectRef]:
        """A snapshot of the policy: its manifest, and a reference to its bytes."""
        manifests: list[Call] = []
        payloads: list[ray.ObjectRef] = []
        for rank, actor in enumerate(self.workers.actors):
            manifest, payload = actor.snapshot.options(num_returns=2).remote(version, probe_tokens)
            manifests.append(Call(manifest, self.workers.name(rank), "take a weight snapshot"))
            payloads.append(payload)
        return wait_for_all(manifests, self.cluster.weights_timeout_s)[0], payloads[0]

    def save(self, folder: Path) -> None:
        """Write every rank's share of a checkpoint into an existing folder."""
        self.workers.call_all(
            "save", folder, action="save a checkpoint", timeout_s=self.cluster.checkpoint_timeout_s
        )

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        self.workers.call_all(
            "load", folder, action="load a checkpoint", timeout_s=self.cluster.checkpoint_timeout_s
        )
