"""All learner ranks as one learner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.experience_queue import LeasedBatch
from rlhf_dist.cluster.learner_worker import LearnerWorker
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.rank_group import RankGroup
from rlhf_dist.config import ClusterSettings
from rlhf_dist.types import FileDigest, PublishedWeights


class LearnerGroup(RankGroup):
    """Consumes references to experience batches, produces weight snapshots."""

    def __init__(self, share: RoleShare, cluster: ClusterSettings) -> None:
        """Create the ranks."""
        super().__init__(LearnerWorker, share, cluster)

    def start(self, events: Events, *args: Any, **kwargs: Any) -> None:
        """As `RankGroup.start`; see `LearnerWorker.start` for the arguments."""
        super().start(events, *args, **kwargs, weights_timeout_s=self.cluster.weights_timeout_s)

    def step(
        self, events: Events, batches: list[LeasedBatch], step: int, temperature: float
    ) -> dict[str, float]:
        """One learner step on every rank; the metrics are the same on each."""
        return self.call_all(
            events,
            "step",
            batches,
            step,
            temperature,
            action=f"do learner step {step}",
            timeout_s=self.cluster.step_timeout_s,
        )[0]

    def publish(self, events: Events, version: int, probe_tokens: Sequence[int]) -> PublishedWeights:
        """Have rank 0 write a snapshot of the policy into its node's shared memory."""
        return self.call_all(
            events,
            "publish",
            version,
            probe_tokens,
            action=f"publish policy version {version}",
            timeout_s=self.cluster.weights_timeout_s,
        )[0]

    def export_adapters(self, events: Events, folder: Path) -> None:
        """Write the policy's adapters alone, as `peft` reads them."""
        self._with_files(events, "export_adapters", folder, "export the adapters")

    def save(self, events: Events, folder: Path) -> dict[str, FileDigest]:
        """Write a checkpoint into an existing folder; its files, by the path in it."""
        return self._with_files(events, "save", folder, "save a checkpoint")

    def load(self, events: Events, folder: Path) -> None:
        """Continue from a checkpoint."""
        self._with_files(events, "load", folder, "load a checkpoint")

    def _with_files(self, events: Events, method: str, folder: Path, action: str) -> Any:
        timeout_s = self.cluster.checkpoint_timeout_s
        return self.call_all(events, method, folder, action=action, timeout_s=timeout_s)[0]
