"""One rank of the supervised stage: cross-entropy on the responses of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from rlhf_dist.data.batching import learner_plan
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.engines.collectives import sum_over_ranks
from rlhf_dist.engines.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.engines.export import export_causal_lm
from rlhf_dist.engines.policy_model import PolicyModel
from rlhf_dist.engines.settings import LearnerSettings, OptimizerSettings
from rlhf_dist.experience.sequences import sequence_batch


class SupervisedTrainer:
    """A rank's share of the policy. Every method is a collective over the group."""

    def __init__(
        self,
        settings: LearnerSettings,
        optimizer: OptimizerSettings,
        *,
        model: str,
        num_steps: int,
        max_tokens_per_micro_batch: int,
        dtype: torch.dtype,
    ) -> None:
        self._max_tokens = max_tokens_per_micro_batch
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._policy = DeepSpeedEngine(
            PolicyModel(
                model,
                dtype=dtype,
                batching=settings.batching,
                gradient_checkpointing=settings.gradient_checkpointing,
            ),
            settings,
            optimizer,
            num_updates=num_steps,
            dtype=dtype,
        )

    def step(self, demonstrations: pa.Table, rows: Sequence[int]) -> float:
        """One optimizer update; returns the mean negative log-likelihood of a response token, in nats."""
        batch = demonstrations.take(rows)
        prompts = [np.asarray(tokens) for tokens in batch["prompt_tokens"].to_pylist()]
        responses = [np.asarray(tokens) for tokens in batch["response_tokens"].to_pylist()]
        num_tokens = sum(len(response) for response in responses)
        plan = learner_plan(
            [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)],
            num_ranks=self._num_ranks,
            num_epochs=1,
            num_minibatches=1,
            max_tokens_per_micro_batch=self._max_tokens,
            packed=self._policy.module.packs,
            seed=0,
        )
        total = torch.zeros(1)
        for indices in plan.epochs[0][0][self._rank]:
            sequences = sequence_batch(
                [prompts[i] for i in indices],
                [responses[i] for i in indices],
                packed=self._policy.module.packs,
            )
            logprobs, _ = self._policy(sequences.to(self._policy.device), with_entropy=False)
            loss = -logprobs.sum() / num_tokens
            self._policy.backward(loss * self._num_ranks)  # DeepSpeed averages over the ranks
            total += loss.detach().cpu()
        self._policy.step()
        return float(sum_over_ranks(total, self._policy.device))

    def export_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer; rank 0 writes."""
        export_causal_lm(self._policy, folder)


def rows_of_step(step: int, *, batch_size: int, order: PromptOrder) -> list[int]:
    """The demonstrations of a step, counted on through the epochs."""
    return order.rows_of(range(step * batch_size, (step + 1) * batch_size))
