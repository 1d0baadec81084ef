"""A learner rank: PPO updates of its share of the policy and value models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from rlhf_dist.cluster.process_group import RankWorker, Rendezvous
from rlhf_dist.types import WeightManifest, WeightPayload

if TYPE_CHECKING:
    from rlhf_dist.algorithms.base import AlgorithmSettings
    from rlhf_dist.engines.settings import LearnerSettings


class LearnerWorker(RankWorker):
    """Consumes leased batches of experience, produces weight snapshots. All ranks get the same calls."""

    def start(
        self,
        rendezvous: Rendezvous,
        settings: LearnerSettings,
        algorithm: AlgorithmSettings,
        *,
        policy_model: str,
        value_model: str | None,
        num_steps: int,
        seed: int,
        collective_timeout_s: float,
    ) -> None:
        """Join the group and load the models."""
        self._timeout_s = collective_timeout_s
        self._join(rendezvous, settings, collective_timeout_s)
        from rlhf_dist.algorithms import make_algorithm
        from rlhf_dist.engines.learner import Learner
        from rlhf_dist.engines.loading import torch_dtype

        self._learner = Learner(
            settings,
            make_algorithm(algorithm),
            policy_model=policy_model,
            value_model=value_model,
            num_steps=num_steps,
            dtype=torch_dtype(settings.dtype, on_gpu=settings.gpus_per_worker > 0),
            seed=seed,
        )

    def step(self, batches: list[ray.ObjectRef], step: int, temperature: float) -> dict[str, float]:
        """Train on leased batches; the references come wrapped in a list, so only the ranks read them."""
        from rlhf_dist.experience.samples import Samples

        samples = Samples.from_batches(ray.get(batches, timeout=self._timeout_s))
        return self._learner.step(samples, step=step, temperature=temperature)

    def snapshot(
        self, version: int, probe_tokens: Sequence[int]
    ) -> tuple[WeightManifest | None, WeightPayload | None]:
        """Rank 0: the manifest for the driver and the payload for the rollout workers, as two objects."""
        return self._learner.snapshot(version, probe_tokens) or (None, None)

    def export_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer."""
        self._learner.export_policy(folder)

    def save(self, folder: Path) -> None:
        """Write this rank's share of a checkpoint."""
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        self._learner.load(folder)
