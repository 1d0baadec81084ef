"""A learner rank: PPO updates of its share of the policy and value models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import ray
from ray.exceptions import ObjectLostError

from rlhf_dist.cluster.imports import without_garbage_collection
from rlhf_dist.cluster.liveness import NUM_SENDING, SENDING
from rlhf_dist.cluster.process_group import RankWorker, Rendezvous, free_port
from rlhf_dist.types import DeviceAddress, FileDigest, Link, PublishedWeights

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.algorithms.base import AlgorithmSettings
    from rlhf_dist.cluster.experience_queue import LeasedBatch
    from rlhf_dist.engines.nccl_link import Senders
    from rlhf_dist.engines.settings import LearnerSettings


class LearnerWorker(RankWorker):
    """Consumes leased batches of experience, produces weight snapshots. All ranks get the same calls."""

    more_groups: ClassVar[dict[str, int]] = {SENDING: NUM_SENDING}

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
        journal: Path,
        weights_timeout_s: float,
        collective_timeout_s: float,
        snapshots_on_gpu: bool = False,
    ) -> None:
        """Join the group and load the models.

        Args:
            journal: its folder, for batches that are in no object store any more.
            weights_timeout_s: deadline of a snapshot that is sent to an engine.
        """
        self._journal, self._timeout_s = journal, collective_timeout_s
        self._weights_timeout_s = weights_timeout_s
        self._join(rendezvous, settings, collective_timeout_s)
        with without_garbage_collection():
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
            snapshots_on_gpu=snapshots_on_gpu,
        )

    def step(self, batches: list[LeasedBatch], step: int, temperature: float) -> dict[str, float]:
        """Train on leased batches; the references come inside a list, so only the ranks read them."""
        from rlhf_dist.experience.samples import Samples

        samples = Samples.from_batches(read_leased(batches, self._journal, timeout_s=self._timeout_s))
        return self._learner.step(samples, step=step, temperature=temperature)

    def publish(self, version: int, probe_tokens: Sequence[int]) -> PublishedWeights | None:
        """Write a weight snapshot into the memory of this node or GPU. Rank 0 says where; None from the
        others."""
        context = ray.get_runtime_context()
        published = self._learner.publish(version, probe_tokens, node=context.get_node_id())
        if published is None or not isinstance(published.segment, DeviceAddress):
            return published
        return replace(published, sender=context.current_actor)

    @ray.method(concurrency_group=SENDING)
    def open_link(self, engine: str, life: str, num_gpus: int) -> Link:
        """Rank 0: where it meets an engine on other GPUs; the same place for as long as the engine lives."""
        link = Link(ray.util.get_node_ip_address(), free_port(), num_gpus + 1, self._weights_timeout_s)
        return self._senders.open(engine, life, link)

    @ray.method(concurrency_group=SENDING)
    def send_weights(self, engine: str, published: PublishedWeights) -> None:
        """Rank 0: send a snapshot through the engine's link, beside whatever the learner does."""
        self._senders.send(engine, published.manifest, self._learner.snapshot(published))

    @cached_property
    def _senders(self) -> Senders:
        from rlhf_dist.engines.nccl_link import Senders

        return Senders()

    def export_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer."""
        self._learner.export_policy(folder)

    def export_adapters(self, folder: Path) -> None:
        """Write the policy's adapters alone, as `peft` reads them."""
        self._learner.export_adapters(folder)

    def save(self, folder: Path) -> dict[str, FileDigest]:
        """Take part in writing a checkpoint. Rank 0 says which files it wrote; none from the others."""
        return self._learner.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        self._learner.load(folder)


def read_leased(batches: Sequence[LeasedBatch], journal: Path, *, timeout_s: float) -> list[pa.RecordBatch]:
    """The rows on loan, from the object store, and from the journal where that is all there is."""
    from rlhf_dist.experience.journal import JournalReader, take_rows

    stored = [batch for batch in batches if batch.ref]
    try:
        wholes = ray.get([batch.ref[0] for batch in stored], timeout=timeout_s)
    except ObjectLostError:  # with the node that held one of them
        return JournalReader(journal).read_rows([batch.rows for batch in batches])
    found = [take_rows(whole, batch.rows.rows) for whole, batch in zip(wholes, stored, strict=True)]
    written = [batch.rows for batch in batches if not batch.ref]
    return found + (JournalReader(journal).read_rows(written) if written else [])
