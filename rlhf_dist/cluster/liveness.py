"""Whether workers still answer: a call to each every few seconds, beside whatever it is busy with.

A killed process is noticed by the calls that it had. One that was stopped, that hangs, or whose node is cut
off would only be noticed at its calls' deadlines, which are long; this notices it within
`recovery.heartbeat_timeout_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import ray

from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import Events, OnFailure
from rlhf_dist.errors import RunError

GROUP = "liveness"
"""The concurrency group, one thread of every worker, that answers while its other threads work."""
SENDING, NUM_SENDING = "sending", 16
"""The concurrency group, and its threads, of what a learner rank sends while it trains."""


class Worker:
    """What every actor of a run has."""

    more_groups: ClassVar[dict[str, int]] = {}
    """Further concurrency groups, and the threads of each."""

    @ray.method(concurrency_group=GROUP)
    def answer_heartbeat(self) -> None:
        """Returns at once, also while another method runs."""


def actor_class_of(worker_class: type[Worker]) -> Any:
    """A Ray actor class whose heartbeat is answered beside its other methods."""
    return ray.remote(concurrency_groups={GROUP: 1} | worker_class.more_groups)(worker_class)


class Heartbeats:
    """Asks workers whether they live, for as long as each is watched.

    Begin when a worker has started: until then it imports and loads, which not even a thread of its own may
    interrupt, and has `cluster.start_timeout_s`.
    """

    def __init__(self, events: Events, *, interval_s: float, timeout_s: float) -> None:
        self._events, self._interval_s, self._timeout_s = events, interval_s, timeout_s

    def watch(self, name: str, actor: Any, is_current: Callable[[], bool], on_failure: OnFailure) -> None:
        """Ask an actor for as long as `is_current` holds; call `on_failure` once if it does not answer."""
        if not is_current():
            return
        call = Call(
            actor.answer_heartbeat.remote(), name, "answer a heartbeat (recovery.heartbeat_timeout_s)"
        )

        def again(_: None) -> None:
            self._events.after(self._interval_s, partial(self.watch, name, actor, is_current, on_failure))

        def failed(error: RunError) -> None:
            if is_current():
                on_failure(error)

        self._events.expect(call, again, self._timeout_s, on_failure=failed)
