"""Actors that are the ranks of one torch process group, called as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.process_group import RankWorker
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import ClusterSettings
from rlhf_dist.errors import DeadlineError, LearnerLostError, RunError, WorkerError, WorkerLostError

CULPRIT_WITHIN_S = 5.0
"""After one rank's failure, for word from the others: the one that died may not be heard of first."""


class RankGroup:
    """All ranks get the same calls, since collectives run inside them: where one fails, all have to end."""

    def __init__(self, worker_class: type[RankWorker], share: RoleShare, cluster: ClusterSettings) -> None:
        self.cluster = cluster
        self.workers = Workers(
            worker_class,
            share,
            placement_timeout_s=cluster.placement_timeout_s,
            arguments=lambda rank: ((rank, share.num_workers), {}),
            together=True,
        )

    def start(self, events: Events, *args: Any, **kwargs: Any) -> None:
        """Have the ranks meet and load.

        Raises:
            LearnerLostError: one of them died, failed, or did not in time.
            RunError: it met an error of the user's.
        """
        timeout_s = self.cluster.start_timeout_s
        meeting = self.workers.call(0, "open_rendezvous", action="open a rendezvous")
        (rendezvous,) = self.collect(events, [meeting], timeout_s)
        kwargs["collective_timeout_s"] = self.cluster.step_timeout_s
        calls = self.workers.start(rendezvous, *args, action="load its models", **kwargs)
        self.collect(events, calls, timeout_s)

    def export_policy(self, events: Events, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, without its tokenizer."""
        self.call_all(
            events,
            "export_policy",
            folder,
            action="export the policy",
            timeout_s=self.cluster.checkpoint_timeout_s,
        )

    def call_all(self, events: Events, method: str, *args: Any, action: str, timeout_s: float) -> list[Any]:
        """Call every rank with the same arguments; the results in order of the ranks. Raises as `collect`."""
        return self.collect(events, self.workers.calls(method, *args, action=action), timeout_s)

    def collect(self, events: Events, calls: Sequence[Call], timeout_s: float) -> list[Any]:
        """The results of calls to ranks, while everything else goes on.

        Raises:
            LearnerLostError: a rank died, failed or was late; the message names the one that began it.
            RunError: a rank met an error of the user's.
        """
        results: dict[Any, Any] = {}
        failures: list[RunError] = []
        for call in calls:
            then = partial(results.__setitem__, call.ref)
            events.expect(call, then, timeout_s, on_failure=failures.append)
        events.wait_until(lambda: bool(failures) or len(results) == len(calls))
        if not failures:
            return [results[call.ref] for call in calls]
        self._hear_the_others(events, failures, lambda: len(results) + len(failures) == len(calls))
        raise _group_failure(failures)

    def dismiss(self, events: Events) -> None:
        """Kill all ranks, whatever they are doing."""
        for rank in range(len(self.workers)):
            self.workers.dismiss(events, rank)

    def replace(self) -> None:
        """Create new ranks in the place of the dismissed ones."""
        for rank in range(len(self.workers)):
            self.workers.replace(rank)

    def end(self) -> None:
        """Kill the ranks."""
        self.workers.end()

    @staticmethod
    def _hear_the_others(events: Events, failures: list[RunError], all_heard: Any) -> None:
        over: list[bool] = []
        events.after(CULPRIT_WITHIN_S, lambda: over.append(True))
        events.wait_until(
            lambda: bool(over) or all_heard() or any(isinstance(each, WorkerLostError) for each in failures)
        )


def _group_failure(failures: Sequence[RunError]) -> RunError:
    """The user's error if there is one; else the group is lost, by the rank that died if one did."""
    for error in failures:
        if not isinstance(error, WorkerError | DeadlineError):
            return error
    first = next((each for each in failures if isinstance(each, WorkerLostError)), failures[0])
    lost = LearnerLostError(str(first))
    lost.__cause__ = first
    return lost
