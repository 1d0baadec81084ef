"""A scoring worker: rewards and reference log-probabilities of rollout batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_dist.types import BatchInfo

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.engines.settings import ScoringSettings
    from rlhf_dist.rewards.settings import RewardSettings


class ScoringWorker:
    """Consumes batches of `ROLLOUT_SCHEMA`, produces batches of `EXPERIENCE_SCHEMA`."""

    def __init__(
        self,
        settings: ScoringSettings,
        rewards: Sequence[RewardSettings],
        *,
        reference_model: str | None,
        policy_model: str,
    ) -> None:
        """Take note of what `start` will load. Arguments as of `ScorerEngine`."""
        self._settings, self._rewards = settings, rewards
        self._reference_model, self._policy_model = reference_model, policy_model

    def start(self) -> None:
        """Load the models and functions."""
        import torch

        from rlhf_dist.engines.loading import torch_dtype
        from rlhf_dist.engines.scorer_engine import ScorerEngine

        on_gpu = self._settings.gpus_per_worker > 0
        self._engine = ScorerEngine(
            self._rewards,
            reference_model=self._reference_model,
            policy_model=self._policy_model,
            max_tokens_per_micro_batch=self._settings.max_tokens_per_micro_batch,
            dtype=torch_dtype(self._settings.dtype, on_gpu=on_gpu),
            device=torch.device("cuda" if on_gpu else "cpu"),
        )

    def score(self, rollouts: pa.RecordBatch, temperature: float) -> tuple[pa.RecordBatch, BatchInfo]:
        """The scored batch, and what the queue may know of it."""
        from rlhf_dist.experience.schema import batch_info

        scored = self._engine.score(rollouts, temperature=temperature)
        return scored, batch_info(scored)
