"""All scoring workers: each rollout batch goes to the one with the least to do, and again where that failed.

A batch whose worker is lost is scored once more elsewhere. One that loses its worker a second time, or whose
reward hangs, is scored sample by sample, so that the sample that does it is found. A sample is given up after
`scoring.max_attempts` failures of its own, ever further apart, with the reason of each: what its batch met
before may have been another's fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray

from rlhf_dist.cluster.calls import facts_of
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.restarts import LONGEST_BACKOFF_S
from rlhf_dist.cluster.scoring_worker import ScoringWorker
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import ScoringSettings
from rlhf_dist.errors import DataLostError, RewardTimeoutError, RunError
from rlhf_dist.rewards.settings import RewardSettings
from rlhf_dist.types import AttemptId, RolloutReport, ScoreReport


@dataclass(frozen=True)
class ScoringJob:
    """Rows of a rollout batch that are to be scored."""

    rollouts: ray.ObjectRef
    samples: tuple[AttemptId, ...]
    """All rows of the batch."""
    rows: tuple[int, ...]
    """Those that are to be scored."""
    temperature: float
    reasons: tuple[str, ...] = ()
    """Why each attempt at these rows so far failed."""
    failed_on: int | None = None
    """The worker of the last attempt."""

    @property
    def takes_all(self) -> bool:
        """Whether no row is left out."""
        return len(self.rows) == len(self.samples)

    def alone(self, row: int) -> ScoringJob:
        """One row; where there were others, what they met counts no more."""
        return self if self.rows == (row,) else replace(self, rows=(row,), reasons=())


@dataclass(frozen=True)
class ScoringHandlers:
    """What becomes of jobs."""

    on_scored: Callable[[ray.ObjectRef, ScoreReport], None]
    on_given_up: Callable[[int, tuple[str, ...]], None]
    """Called with a prompt's ordinal, and why each attempt at its sample failed."""
    on_rollouts_lost: Callable[[tuple[AttemptId, ...], str], None]
    """Called with the attempts whose samples must be generated again, and why."""


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
        journal: Path,
        segment_bytes: int,
    ) -> None:
        """Create the workers; see `ScoringWorker` for its arguments."""
        self._settings, self._cluster = settings, cluster
        self.workers = Workers(
            ScoringWorker,
            share,
            placement_timeout_s=cluster.placement_timeout_s,
            arguments=lambda index: (
                (f"scoring worker {index}", settings, rewards),
                {
                    "reference_model": reference_model,
                    "policy_model": policy_model,
                    "journal": journal,
                    "segment_bytes": segment_bytes,
                },
            ),
        )
        self._ready: set[int] = set()
        self._jobs: list[deque[ScoringJob]] = [deque() for _ in range(len(self.workers))]
        """Of each worker, in the order in which it does them."""
        self._waiting: deque[ScoringJob] = deque()
        """While no worker is ready."""
        self._handlers: ScoringHandlers | None = None

    def __len__(self) -> int:
        return len(self.workers)

    def handle(self, handlers: ScoringHandlers) -> None:
        """Say what becomes of jobs; before the first one."""
        self._handlers = handlers

    def start(self, events: Events, index: int, on_started: Callable[[], None]) -> None:
        """Have a worker load its models; from then on it gets batches."""

        def then(_: None) -> None:
            self._ready.add(index)
            while self._waiting:
                self._submit(events, self._waiting.popleft())
            on_started()

        self.workers.expect(
            events,
            index,
            "start",
            action="load its models",
            then=then,
            timeout_s=self._cluster.start_timeout_s,
        )

    def has_workers(self) -> bool:
        """Whether any worker is ready."""
        return bool(self._ready)

    def is_busy(self, index: int) -> bool:
        """Whether a worker has a batch, which is to blame when it is lost."""
        return bool(self._jobs[index])

    def is_ready(self) -> bool:
        """Whether every worker has loaded its models."""
        return len(self._ready) == len(self)

    def score(
        self, events: Events, rollouts: ray.ObjectRef, report: RolloutReport, temperature: float
    ) -> None:
        """Have a batch of rollouts scored."""
        rows = tuple(range(len(report.samples)))
        self._submit(events, ScoringJob(rollouts, report.samples, rows, temperature))

    def dismiss(self, events: Events, index: int, error: RunError) -> int:
        """Kill a worker and have its batches scored elsewhere; returns how many there were.

        Args:
            error: why. The batch that it was busy with is to blame, as far as anybody knows.
        """
        self._ready.discard(index)
        self.workers.dismiss(events, index)
        jobs, self._jobs[index] = self._jobs[index], deque()
        for position, job in enumerate(jobs):
            if position == 0:
                one_by_one = isinstance(error, RewardTimeoutError)
                self._again(events, job, facts_of(error), index, one_by_one=one_by_one)
            else:
                self._submit(events, job)
        return len(jobs)

    def end(self) -> None:
        """Kill the workers."""
        self.workers.end()

    def _submit(self, events: Events, job: ScoringJob) -> None:
        if not self._ready:
            self._waiting.append(job)
            return
        others = self._ready - {job.failed_on}
        index = min(others or self._ready, key=lambda each: (self._num_samples_open(each), each))
        self._jobs[index].append(job)
        actor = self.workers.actors[index]
        scored, report = actor.score.options(num_returns=2).remote(
            job.rollouts, job.temperature, None if job.takes_all else job.rows
        )
        events.expect(
            self.workers.as_call(report, index, "score a batch (cluster.score_timeout_s)"),
            partial(self._done, events, index, job, scored),
            self._cluster.score_timeout_s * len(self._jobs[index]),  # those ahead of it come first
            on_failure=partial(self._failed, index, job),
        )

    def _num_samples_open(self, index: int) -> int:
        return sum(len(job.rows) for job in self._jobs[index])

    def _done(
        self, events: Events, index: int, job: ScoringJob, scored: ray.ObjectRef, report: ScoreReport
    ) -> None:
        self._jobs[index].remove(job)
        assert self._handlers is not None
        self._handlers.on_scored(scored, report)
        for failed in report.failed:
            self._again(events, job.alone(failed.row), failed.reason, index)

    def _failed(self, index: int, job: ScoringJob, error: RunError) -> None:
        if isinstance(error, DataLostError):
            self._jobs[index].remove(job)
            assert self._handlers is not None
            lost = tuple(sorted({job.samples[row] for row in job.rows}))
            self._handlers.on_rollouts_lost(lost, str(error))
        else:
            self.workers.on_failure(index, error)

    def _again(
        self, events: Events, job: ScoringJob, reason: str, index: int, *, one_by_one: bool = False
    ) -> None:
        """Have a job that failed done elsewhere, or give its sample up."""
        job = replace(job, reasons=(*job.reasons, reason), failed_on=index)
        if len(job.rows) == 1:
            self._again_alone(events, job)
        elif one_by_one or len(job.reasons) > 1:
            for row in job.rows:
                self._submit(events, job.alone(row))
        else:
            self._submit(events, job)

    def _again_alone(self, events: Events, job: ScoringJob) -> None:
        num_failures = len(job.reasons)
        if num_failures < self._settings.max_attempts:
            pause_s = min(self._settings.backoff_s * 2 ** (num_failures - 1), LONGEST_BACKOFF_S)
            events.after(pause_s, partial(self._submit, events, job))
        else:
            assert self._handlers is not None
            self._handlers.on_given_up(job.samples[job.rows[0]].ordinal, job.reasons)
