"""A rank of the supervised stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.cluster.process_group import RankWorker, Rendezvous

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.data.settings import SFTSettings
    from rlhf_dist.engines.settings import LearnerSettings


class SupervisedWorker(RankWorker):
    """Consumes demonstrations, produces a policy to start reinforcement learning from."""

    def start(
        self,
        rendezvous: Rendezvous,
        settings: LearnerSettings,
        sft: SFTSettings,
        *,
        model: str,
        demonstrations: pa.Table,
        seed: int,
        collective_timeout_s: float,
    ) -> None:
        """Join the group and load the model."""
        self._join(rendezvous, settings, collective_timeout_s)
        from rlhf_dist.data.prompts import PromptOrder
        from rlhf_dist.engines.loading import torch_dtype
        from rlhf_dist.engines.settings import OptimizerSettings
        from rlhf_dist.engines.supervised import SupervisedTrainer

        self._sft, self._demonstrations = sft, demonstrations
        self._order = PromptOrder(demonstrations.num_rows, seed, sft.shuffle)
        self._trainer = SupervisedTrainer(
            settings,
            OptimizerSettings(
                learning_rate=sft.learning_rate, warmup_steps=sft.warmup_steps, schedule=sft.schedule
            ),
            model=model,
            num_steps=sft.num_steps,
            max_tokens_per_micro_batch=sft.max_tokens_per_micro_batch,
            dtype=torch_dtype(settings.dtype, on_gpu=settings.gpus_per_worker > 0),
        )

    def step(self, step: int) -> float:
        """Train on one batch of demonstrations; returns the loss, in nats a response token."""
        from rlhf_dist.engines.supervised import rows_of_step

        rows = rows_of_step(step, batch_size=self._sft.batch_size, order=self._order)
        return self._trainer.step(self._demonstrations, rows)

    def export_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer."""
        self._trainer.export_policy(folder)
