"""All scoring workers: each rollout batch goes to the one with the least to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import ray

from rlhf_dist.cluster.calls import Call, wait_for
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.scoring_worker import ScoringWorker
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import ScoringSettings
from rlhf_dist.errors import DeadlineError
from rlhf_dist.rewards.settings import RewardSettings
from rlhf_dist.types import BatchInfo


class ScoringPool:
    """Consumes references to rollout batches, produces references to experience batches."""

    def __init__(
        self,
        settings: ScoringSettings,
        share: RoleShare,
        cluster: ClusterSettings,
        rewards: Sequence[RewardSettings],
        *,
        reference_model: str | None,
        policy_model: str,
    ) -> None:
        """Create the workers; see `ScoringWorker` for its arguments."""
        self._cluster = cluster
        self._workers = Workers(
            ScoringWorker,
            share,
            placement_timeout_s=cluster.placement_timeout_s,
            arguments=lambda _: (
                (settings, rewards),
                {"reference_model": reference_model, "policy_model": policy_model},
            ),
        )
        self._num_samples_open = [0] * len(self._workers)

    def start(self) -> list[Call]:
        """Have every worker begin to load; wait for the calls to know that it did."""
        return self._workers.start(action="load its models")

    def score(
        self, rollouts: Iterable[tuple[ray.ObjectRef, int]], temperature: float
    ) -> Iterator[tuple[ray.ObjectRef, BatchInfo]]:
        """Scored batches as they finish, while more rollouts come in."""
        under_way: dict[ray.ObjectRef, tuple[ray.ObjectRef, int, int]] = {}
        for rollout_batch, num_samples in rollouts:
            index = self._num_samples_open.index(min(self._num_samples_open))
            self._num_samples_open[index] += num_samples
            method = self._workers.actors[index].score.options(num_returns=2)
            scored, info = method.remote(rollout_batch, temperature)
            under_way[info] = (scored, index, num_samples)
            yield from self._collect(under_way, timeout_s=0)
        while under_way:
            yield from self._collect(under_way, timeout_s=self._cluster.score_timeout_s)

    def end(self) -> None:
        """Kill the workers."""
        self._workers.end()

    def _collect(
        self, under_way: dict[ray.ObjectRef, tuple[ray.ObjectRef, int, int]], *, timeout_s: float
    ) -> Iterator[tuple[ray.ObjectRef, BatchInfo]]:
        done, _ = ray.wait(list(under_way), num_returns=1, timeout=timeout_s)
        if not done and timeout_s > 0:
            raise DeadlineError(
                f"{len(under_way)} batches were not scored within {timeout_s:g} s by "
                f"{len(self._workers)} scoring workers (cluster.score_timeout_s)"
            )
        for info in done:
            scored, index, num_samples = under_way.pop(info)
            self._num_samples_open[index] -= num_samples
            call = Call(info, self._workers.name(index), "score a batch")
            yield scored, wait_for(call, self._cluster.score_timeout_s)
