"""What DeepSpeed alone takes of a learner's step: the same passes over the same micro-batches, a plain loss.

No advantages, entropies, statistics, metrics or exchanges between ranks, and the models' inputs are made
before the clock starts: what a learner's step takes longer is what this system adds to DeepSpeed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_dist.config import Config
from rlhf_dist.data.batching import learner_plan
from rlhf_dist.engines.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.engines.loading import torch_dtype
from rlhf_dist.engines.policy_model import PolicyModel
from rlhf_dist.engines.scalar_model import ValueModel
from rlhf_dist.experience.samples import Samples
from rlhf_dist.experience.sequences import SequenceBatch

Inputs = dict[DeepSpeedEngine, SequenceBatch]
"""One micro-batch, as each model takes it."""


class BareLoop:
    """The models of a learner that is alone in its group; the process group must exist."""

    def __init__(self, config: Config, *, policy_model: str, value_model: str | None) -> None:
        """Load the models into DeepSpeed, with the settings of the run's learner."""
        self._settings, self._algorithm, self._seed = config.learner, config.algorithm, config.run.seed
        dtype = torch_dtype(self._settings.dtype, on_gpu=self._settings.gpus_per_worker > 0)
        num_updates = config.run.num_steps * self._algorithm.num_epochs * self._algorithm.num_minibatches
        options: dict[str, Any] = {
            "dtype": dtype,
            "batching": self._settings.batching,
            "gradient_checkpointing": self._settings.gradient_checkpointing,
        }
        policy = PolicyModel(policy_model, **options, lora=self._settings.lora, seed=self._seed)
        modules: list[tuple[Any, Any]] = [(policy, self._settings.policy_optimizer)]
        if value_model is not None:
            value = ValueModel(value_model, role="value", **options)
            modules.append((value, self._settings.value_optimizer))
        self._engines = [
            DeepSpeedEngine(module, self._settings, optimizer, num_updates=num_updates, dtype=dtype)
            for module, optimizer in modules
        ]

    def step_seconds(self, samples: Samples, *, step: int, temperature: float) -> float:
        """How long the passes and the optimizer's updates of a learner's step take."""
        packed = all(engine.module.packs for engine in self._engines)
        plan = learner_plan(
            samples.total_lengths,
            num_ranks=1,
            num_epochs=self._algorithm.num_epochs,
            num_minibatches=min(self._algorithm.num_minibatches, samples.num_samples),
            max_tokens_per_micro_batch=self._settings.max_tokens_per_micro_batch,
            packed=packed,
            seed=(self._seed, step),
        )
        (forward,) = plan.forward
        before = [self._inputs(samples, indices) for indices in forward]
        updates = [
            [self._inputs(samples, indices) for indices in rank]
            for minibatches in plan.epochs
            for (rank,) in minibatches
        ]
        started = time.monotonic()
        self._forward(before, temperature)
        for minibatch in updates:
            self._update(minibatch, temperature)
        if self._engines[0].device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    def _inputs(self, samples: Samples, indices: Sequence[int]) -> Inputs:
        return {
            engine: samples.sequences(indices, packed=engine.module.packs).to(engine.device)
            for engine in self._engines
        }

    @torch.no_grad()
    def _forward(self, inputs: Sequence[Inputs], temperature: float) -> None:
        for micro in inputs:
            self._outputs(micro, temperature)

    def _update(self, inputs: Sequence[Inputs], temperature: float) -> None:
        for micro in inputs:
            for engine, output in self._outputs(micro, temperature):
                engine.backward((output - 1.0).square().mean() / len(inputs))
        for engine in self._engines:
            engine.step()

    def _outputs(self, micro: Inputs, temperature: float) -> list[tuple[DeepSpeedEngine, torch.Tensor]]:
        policy, *value = self._engines
        logprobs, _ = policy(micro[policy], temperature, with_entropy=False)
        return [(policy, logprobs), *((engine, engine(micro[engine])) for engine in value)]
