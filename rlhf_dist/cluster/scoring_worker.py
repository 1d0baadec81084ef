"""A scoring worker: rewards and reference log-probabilities of rollout batches, brought into the journal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.cluster.imports import without_garbage_collection
from rlhf_dist.cluster.liveness import Worker
from rlhf_dist.types import FailedSample, ScoreReport

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.engines.settings import ScoringSettings
    from rlhf_dist.rewards.settings import RewardSettings


class ScoringWorker(Worker):
    """Consumes batches of `ROLLOUT_SCHEMA`, produces batches of `EXPERIENCE_SCHEMA`."""

    def __init__(
        self,
        name: str,
        settings: ScoringSettings,
        rewards: Sequence[RewardSettings],
        *,
        reference_model: str | None,
        policy_model: str,
        journal: Path,
        segment_bytes: int,
    ) -> None:
        """Take note of what `start` will load. Arguments as of `ScorerEngine` and `JournalWriter`."""
        self._name, self._settings, self._rewards = name, settings, rewards
        self._journal, self._segment_bytes = journal, segment_bytes
        self._reference_model, self._policy_model = reference_model, policy_model

    def start(self) -> None:
        """Load the models and functions."""
        with without_garbage_collection():
            import torch

            from rlhf_dist.engines.loading import torch_dtype
            from rlhf_dist.engines.scorer_engine import ForwardPasses, ScorerEngine
            from rlhf_dist.experience.journal import JournalWriter

        self._writer = JournalWriter(self._journal, self._name, max_segment_bytes=self._segment_bytes)
        on_gpu = self._settings.gpus_per_worker > 0
        self._engine = ScorerEngine(
            self._rewards,
            reference_model=self._reference_model,
            policy_model=self._policy_model,
            forward=ForwardPasses(
                self._settings.max_tokens_per_micro_batch,
                self._settings.batching,
                torch_dtype(self._settings.dtype, on_gpu=on_gpu),
                torch.device("cuda" if on_gpu else "cpu"),
            ),
        )

    def score(
        self, rollouts: pa.RecordBatch, temperature: float, rows: tuple[int, ...] | None = None
    ) -> tuple[pa.RecordBatch | None, ScoreReport]:
        """Score some rows of a batch; None: all of them.

        Returns:
            The scored batch, which is in the journal when this returns; None where nothing could be scored.
            And what the queue may know of it, with the samples that could not.

        Raises:
            RewardTimeoutError: a reward function did not return in time; this worker is of no more use.
            RunError: the batch has another schema, or the journal cannot be written.
        """
        from rlhf_dist.experience.journal import take_rows
        from rlhf_dist.experience.schema import ROLLOUT_SCHEMA, batch_info, check_schema

        started = time.monotonic()
        check_schema(rollouts.schema, ROLLOUT_SCHEMA)
        if rows is None:
            rows = tuple(range(rollouts.num_rows))
        chosen = take_rows(rollouts, rows)
        scored, failed = self._engine.score(chosen, temperature=temperature, scorer=self._name)
        info = None if scored is None else batch_info(scored, self._writer.append(scored))
        ordinals, samples, attempts = (chosen[name].to_pylist() for name in ("ordinal", "sample", "attempt"))
        failures = tuple(
            FailedSample(rows[row], ordinals[row], samples[row], attempts[row], reason)
            for row, reason in sorted(failed.items())
        )
        return scored, ScoreReport(info, time.monotonic() - started, failures)
