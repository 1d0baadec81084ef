"""One rank of the learner group: what a step does with a batch of experience.

Consumes a batch (`Samples`), produces new policy weights. In one step, on every rank alike:

    1. forward      values and log-probabilities under the weights before the step; each rank computes its
                    share of the batch, then the shares are exchanged
    2. estimate     the algorithm's advantages and returns, and the correction for the gap between sampler and
                    learner, on the whole batch
    3. update       epochs x minibatches; each rank takes its token-balanced part of a minibatch in
                    micro-batches; losses divide by the minibatch's token count over all ranks, so the
                    result does not depend on how the batch was cut. Where the algorithm asks for a trust
                    region, the policy makes one step over the whole batch instead, and only the value model
                    goes through epochs
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_dist.algorithms.base import STATE_FILE, Algorithm, StepBatch, TrustRegion
from rlhf_dist.algorithms.parts.correction import correct
from rlhf_dist.data.batching import Plan, RankBatches, learner_plan
from rlhf_dist.engines.checkpoint_files import FolderWriter
from rlhf_dist.engines.collectives import GroupMetrics, from_rank_0, sum_over_ranks
from rlhf_dist.engines.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.engines.export import export_adapters, export_causal_lm
from rlhf_dist.engines.model_tensors import model_tensors, trained_tensors
from rlhf_dist.engines.pieces import StepData, named
from rlhf_dist.engines.policy_model import PolicyModel
from rlhf_dist.engines.scalar_model import ValueModel
from rlhf_dist.engines.settings import LearnerSettings
from rlhf_dist.engines.step_metrics import sample_metrics, token_metrics
from rlhf_dist.engines.trust_region import BatchObjective, trust_region_step
from rlhf_dist.errors import RunError
from rlhf_dist.experience.samples import Samples
from rlhf_dist.experience.sequences import SequenceBatch, sequence_batch
from rlhf_dist.settings import GIB
from rlhf_dist.types import FileDigest, Probe, PublishedWeights
from rlhf_dist.weights.device_memory import DevicePublisher
from rlhf_dist.weights.shared_memory import SharedMemoryPublisher
from rlhf_dist.weights.snapshot import snapshot_bytes
from rlhf_dist.weights.transport import Publisher


class Learner:
    """A rank's share of the policy and value models. Every method is a collective over the group."""

    def __init__(
        self,
        settings: LearnerSettings,
        algorithm: Algorithm,
        *,
        policy_model: str,
        value_model: str | None,
        num_steps: int,
        dtype: torch.dtype,
        seed: int,
        snapshots_on_gpu: bool = False,
    ) -> None:
        """Load the models into DeepSpeed; the process group must exist.

        Args:
            policy_model, value_model: checkpoint folders or hub names; without a value model None.
            num_steps: learner steps of the whole run, for the learning-rate schedule.
            dtype: compute dtype.
            seed: of the run; decides the shuffles of the epochs and where adapters start.
            snapshots_on_gpu: weight snapshots stay in this rank's GPU, instead of the node's memory.
        """
        self._settings, self._algorithm, self._seed = settings, algorithm, seed
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        updates_per_step = algorithm.settings.num_epochs * algorithm.settings.num_minibatches
        num_policy_steps = sum(algorithm.trains_policy(step) for step in range(num_steps))
        options: dict[str, Any] = {
            "dtype": dtype,
            "batching": settings.batching,
            "gradient_checkpointing": settings.gradient_checkpointing,
        }
        self._policy = DeepSpeedEngine(
            PolicyModel(policy_model, **options, lora=settings.lora, seed=seed),
            settings,
            settings.policy_optimizer,
            num_updates=num_policy_steps * updates_per_step,
            dtype=dtype,
        )
        self._num_trained_parameters = sum(
            each.num_elements for each in trained_tensors(self._policy.module.lm)
        )
        self._publisher: Publisher | None = None
        if self._rank == 0:
            num_bytes = snapshot_bytes(each.num_bytes for each in model_tensors(self._policy.module.lm))
            self._publisher = (
                DevicePublisher(num_bytes, self._policy.device)
                if snapshots_on_gpu
                else SharedMemoryPublisher(num_bytes, num_threads=torch.get_num_threads())
            )
        self._value: DeepSpeedEngine | None = None
        if value_model is not None:
            self._value = DeepSpeedEngine(
                ValueModel(value_model, role="value", **options),
                settings,
                settings.value_optimizer,
                num_updates=num_steps * updates_per_step,
                dtype=dtype,
            )

    def step(self, samples: Samples, *, step: int, temperature: float) -> dict[str, float]:
        """Train on a batch; returns the step's metrics, the same on every rank.

        Args:
            step: learner step, from 0.
            temperature: what the samples were drawn at, and so what log-probabilities are taken at.

        Raises:
            RunError: a gradient was not finite, and the parameters are no more either.
        """
        packed = all(engine.module.packs for _, engine in self._engines())
        plan = learner_plan(
            samples.total_lengths,
            num_ranks=self._num_ranks,
            num_epochs=self._algorithm.settings.num_epochs,
            num_minibatches=min(self._algorithm.settings.num_minibatches, samples.num_samples),
            max_tokens_per_micro_batch=self._settings.max_tokens_per_micro_batch,
            packed=packed,
            seed=(self._seed, step),
        )
        batch, entropies = self._forward(samples, plan, temperature)
        estimates, metrics = self._algorithm.estimate(batch)
        correction = correct(
            self._algorithm.settings.correction, batch.old_logprobs, batch.rollout_logprobs, batch.mask
        )
        metrics |= correction.metrics | sample_metrics(samples) | token_metrics(batch, entropies)
        metrics["num_trained_parameters"] = self._num_trained_parameters
        metrics["padding_share"] = plan.padding_share(samples.total_lengths, packed=packed)
        data = StepData(samples, batch, estimates, correction)
        with_policy, region = self._algorithm.trains_policy(step), self._algorithm.needs.trust_region
        if with_policy and region is not None:
            metrics |= self._trust_region_step(region, data, plan.forward, temperature)
        metrics |= self._update(data, plan, temperature, with_policy=with_policy and region is None)
        self._check_gradients(step, metrics)
        return metrics

    def publish(self, version: int, probe_tokens: Sequence[int], *, node: str) -> PublishedWeights | None:
        """Write a snapshot of the policy with the learner's answer to the probe; None except on rank 0.

        Adapters answer the probe beside the weights, and are merged into them in the snapshot. The weights
        stay as they are until this returns; nothing after it makes the next update wait.

        Args:
            node: Ray's id of this node.
        """
        started = time.monotonic()
        probe = self._probe(probe_tokens)
        probed = time.monotonic()
        buckets = self._policy.gathered(model_tensors(self._policy.module.lm))
        if self._publisher is None:
            for _ in buckets:  # the other ranks take part in the gather
                pass
            return None
        manifest, segment = self._publisher.publish(version, buckets, probe)
        write_s = time.monotonic() - probed
        return PublishedWeights(manifest, segment, node, probe_s=probed - started, write_s=write_s)

    def snapshot(self, published: PublishedWeights) -> torch.Tensor:
        """All bytes of a snapshot in this rank's GPU memory, on rank 0. No collective.

        Raises:
            WeightsError: it has been overwritten.
        """
        assert isinstance(self._publisher, DevicePublisher)
        return self._publisher.contents(published.segment.generation)

    @torch.no_grad()
    def _probe(self, probe_tokens: Sequence[int]) -> Probe:
        tokens = torch.tensor(probe_tokens).numpy()
        sequence = sequence_batch([tokens[:1]], [tokens[1:]], packed=self._policy.module.packs)
        logprobs, _ = self._policy(sequence.to(self._policy.device), with_entropy=False)
        return Probe(tuple(probe_tokens), tuple(logprobs[0].tolist()))

    def export_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer; rank 0 writes."""
        export_causal_lm(self._policy, folder)

    def export_adapters(self, folder: Path) -> None:
        """Write the policy's adapters alone, as `peft` reads them; rank 0 writes."""
        export_adapters(self._policy, folder)

    def save(self, folder: Path) -> dict[str, FileDigest]:
        """Write a checkpoint into an existing folder; rank 0 writes, and returns what.

        Raises:
            StorageError: on rank 0, once the other ranks are done; the group can go on.
        """
        writer = FolderWriter(folder if self._rank == 0 else None)
        for name, engine in self._engines():
            engine.save(writer, name)
        state = io.BytesIO()
        torch.save(self._algorithm.state_dict(), state)
        writer.write(STATE_FILE, [state.getbuffer()])
        return writer.finish()

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, also with another number of ranks or ZeRO stage.

        Raises:
            StorageError: it cannot be read, or is of other models.
        """
        for name, engine in self._engines():
            engine.load(folder / name)
        self._algorithm.load_state_dict(torch.load(folder / STATE_FILE, weights_only=True))

    def _engines(self) -> Iterator[tuple[str, DeepSpeedEngine]]:
        yield "policy", self._policy
        if self._value is not None:
            yield "value", self._value

    def _batches(self, samples: Samples, indices: Sequence[int]) -> dict[DeepSpeedEngine, SequenceBatch]:
        """The chosen samples as each model takes them, made once for models that take them alike."""
        made: dict[bool, SequenceBatch] = {}
        for _, engine in self._engines():
            packed = engine.module.packs
            if packed not in made:
                made[packed] = samples.sequences(indices, packed=packed).to(engine.device)
        return {engine: made[engine.module.packs] for _, engine in self._engines()}

    @torch.no_grad()
    def _forward(self, samples: Samples, plan: Plan, temperature: float) -> tuple[StepBatch, torch.Tensor]:
        num_tokens = samples.num_response_tokens
        logprobs, entropies, values = (torch.zeros(num_tokens) for _ in range(3))
        for indices in plan.forward[self._rank]:
            batches = self._batches(samples, indices)
            micro_logprobs, micro_entropies = self._policy(batches[self._policy], temperature)
            samples.scatter(micro_logprobs, indices, into=logprobs)
            samples.scatter(micro_entropies, indices, into=entropies)
            if self._value is not None:
                samples.scatter(self._value(batches[self._value]), indices, into=values)
        logprobs, entropies, values = sum_over_ranks(
            torch.stack([logprobs, entropies, values]), self._policy.device
        )
        batch = StepBatch(
            mask=samples.padded(samples.response_mask).bool(),
            rollout_logprobs=samples.padded(samples.rollout_logprobs),
            old_logprobs=samples.padded(logprobs),
            rewards=torch.from_numpy(samples.rewards).float(),
            values=samples.padded(values) if self._value is not None else None,
            ref_logprobs=None if samples.ref_logprobs is None else samples.padded(samples.ref_logprobs),
            group_ids=torch.from_numpy(samples.ordinals),
        )
        return batch, samples.padded(entropies)

    def _update(
        self, data: StepData, plan: Plan, temperature: float, *, with_policy: bool
    ) -> dict[str, float]:
        """Every epoch, or fewer where the policy goes further than `target_kl` from the old one."""
        group_metrics = GroupMetrics()
        engines = {name: engine for name, engine in self._engines() if with_policy or name != "policy"}
        norms: dict[str, list[float]] = {name: [] for name in engines}
        target, approx_kl, num_updates = self._algorithm.settings.target_kl, 0.0, 0
        learning_rate = self._policy.learning_rate
        for minibatch in chain.from_iterable(plan.epochs):
            approx_kl = self._accumulate(data, minibatch, temperature, group_metrics, with_policy=with_policy)
            for name, engine in engines.items():
                norms[name].append(engine.step())
            num_updates += 1
            if target is not None and approx_kl > target:
                break  # on every rank alike: the KL is that of all of them
        group_metrics.add(self._peak_memory(), num_tokens=1)
        metrics = group_metrics.reduce()
        metrics |= {f"{name}_grad_norm": sum(each) / len(each) for name, each in norms.items()}
        metrics["num_updates"] = num_updates
        if with_policy:
            metrics |= {"policy_learning_rate": learning_rate, "policy_approx_kl_last": approx_kl}
            self._algorithm.after_updates(approx_kl)
        return metrics

    def _peak_memory(self) -> dict[str, torch.Tensor]:
        """The most that was allocated on this rank's GPU since the last step; without one nothing."""
        if self._policy.device.type != "cuda":
            return {}
        peak_gib = torch.tensor(torch.cuda.max_memory_allocated() / GIB)
        torch.cuda.reset_peak_memory_stats()
        return {"learner_gpu_gib_max": peak_gib}

    def _check_gradients(self, step: int, metrics: dict[str, float]) -> None:
        for name, engine in self._engines():
            norm = metrics.get(f"{name}_grad_norm", 0.0)
            if not (math.isfinite(norm) or engine.skips_overflow):
                raise RunError(
                    f"learner step {step}: the gradient of the {name} model is not finite (norm {norm}), of "
                    f"samples with rewards from {metrics['reward_min']:g} to {metrics['reward_max']:g}; give "
                    "rewards of a smaller size (their weight scales them) or a lower learning rate. --resume "
                    "repeats the step with the same samples, from the last checkpoint"
                )

    def _trust_region_step(
        self, region: TrustRegion, data: StepData, batches: RankBatches, temperature: float
    ) -> dict[str, float]:
        """The policy's step in a trust region. The statistics are of the policy after it."""
        device, group_metrics = self._policy.device, GroupMetrics()
        objective = BatchObjective(
            self._policy.module.lm,
            self._algorithm,
            data,
            batches,
            rank=self._rank,
            packed=self._policy.module.packs,
            temperature=temperature,
            sum_over_ranks=partial(sum_over_ranks, device=device),
        )
        metrics, pieces = trust_region_step(
            objective, region, from_rank_0=partial(from_rank_0, device=device)
        )
        for piece in pieces:
            group_metrics.add(*piece)
        metrics |= group_metrics.reduce()
        approx_kl = metrics.get("policy_approx_kl_k3", 0.0)
        self._algorithm.after_updates(approx_kl)
        return metrics | {"policy_approx_kl_last": approx_kl}

    def _accumulate(
        self,
        data: StepData,
        minibatch: RankBatches,
        temperature: float,
        group_metrics: GroupMetrics,
        *,
        with_policy: bool,
    ) -> float:
        """Backward passes of this rank's micro-batches of one minibatch.

        Returns:
            How far the policy is from the old one, in nats a token of the minibatch over all ranks (k3).
        """
        counts = data.counts(minibatch)
        moved = torch.zeros(1)
        for indices in minibatch[self._rank]:
            micro = data.piece(indices, *counts).to(self._policy.device)
            batches = self._batches(data.samples, indices)
            size = len(indices)  # 0 for an idle rank, whose pass has one row that counts for nothing
            num_tokens = int(micro.mask.sum())
            if with_policy:
                logprobs, entropy = self._policy(batches[self._policy], temperature)
                loss, stats = self._algorithm.policy_objective(logprobs[:size], entropy[:size], micro)
                self._policy.backward(loss * self._num_ranks)  # DeepSpeed averages over the ranks
                group_metrics.add(named("policy", loss, stats, micro), num_tokens)
                moved += num_tokens * float(stats["approx_kl_k3"])
            if self._value is not None:
                values = self._value(batches[self._value])
                loss, stats = self._algorithm.value_objective(values[:size], micro)
                self._value.backward(loss * self._num_ranks)
                group_metrics.add(named("value", loss, stats, micro), num_tokens)
        return float(sum_over_ranks(moved, self._policy.device)) / max(counts[0], 1)
