"""Everything that is under way at the same time, waited for in one place.

The driver has one thread. It waits for one call after the other, as its algorithm reads; while it waits, what
else arrives is handled: a batch of rollouts goes on to scoring, a scored one into the queue, a worker that is
lost is replaced.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from rlhf_dist.cluster.calls import Call, late, wait_for
from rlhf_dist.errors import RunError, WorkerLostError

Handler = Callable[[Any], None]
OnFailure = Callable[[RunError], None]

DEADLINES_EVERY_S = 1.0
"""Also where something always arrives, deadlines are looked at this often."""
LONGEST_TURN_S = 1.0
"""Also where nothing arrives, `on_turn` is called this often."""
PAUSE_S = LONGEST_TURN_S + 5.0
"""Where more than this passes from turn to turn, this process was stopped, or busy with something else."""


def raise_it(error: RunError) -> None:
    """What becomes of a failure that nobody handles: it ends the run."""
    raise error


@dataclass
class _Awaited:
    """A call, or the next item of a stream."""

    worker: str
    action: str
    then: Handler
    timeout_s: float
    since: float
    on_failure: OnFailure = raise_it
    idle: Callable[[], bool] | None = None
    """Of a stream: whether nothing is due at the moment, so that the deadline starts anew."""


class Events:
    """Calls, streams and timers under way, each with its handler. Handlers start calls; they never wait."""

    def __init__(self) -> None:
        self._awaited: dict[Any, _Awaited] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._deadlines_seen_at = self._listened_at = time.monotonic()
        self.on_turn: Callable[[], None] = lambda: None
        """Called again and again while something is waited for; what it raises ends the wait."""

    def expect(
        self, call: Call, then: Handler, timeout_s: float, *, on_failure: OnFailure = raise_it
    ) -> None:
        """Have `then` called with a call's result when it is there, or `on_failure` with what went wrong."""
        self._awaited[call.ref] = _Awaited(
            call.worker, call.action, then, timeout_s, time.monotonic(), on_failure
        )

    def listen(
        self,
        stream: ray.ObjectRefGenerator,
        worker: str,
        action: str,
        then: Handler,
        timeout_s: float,
        *,
        idle: Callable[[], bool],
        on_failure: OnFailure = raise_it,
    ) -> None:
        """Have `then` called with the reference of each item of a stream that never ends.

        The last item of a worker that failed holds its error; `then` gets it as every other one.

        Args:
            idle: whether nothing is due from the worker, so that its deadline does not run.
            on_failure: called when the stream ended all the same, or its deadline is past.
        """
        self._awaited[stream] = _Awaited(worker, action, then, timeout_s, time.monotonic(), on_failure, idle)

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Have `then` called when the time has passed."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), then))

    def forget(self, worker: str) -> None:
        """Wait no more for anything from a worker."""
        self._awaited = {ref: each for ref, each in self._awaited.items() if each.worker != worker}

    def wait_for(self, call: Call, timeout_s: float) -> Any:
        """The call's result; everything else that arrives meanwhile is handled.

        Raises:
            RunError: as `calls.wait_for`, for this call or any other one under way.
        """
        return self.wait_for_all([call], timeout_s)[0]

    def wait_for_all(self, calls: Sequence[Call], timeout_s: float) -> list[Any]:
        """The results of calls that run side by side, as `wait_for`."""
        results: dict[Any, Any] = {}
        for call in calls:
            self.expect(call, partial(results.__setitem__, call.ref), timeout_s)
        self.wait_until(lambda: len(results) == len(calls))
        return [results[call.ref] for call in calls]

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Handle what arrives until a condition that handlers bring about holds. Raises as `wait_for`."""
        while not reached():
            self._turn()

    def sleep(self, seconds: float) -> None:
        """Handle what arrives for so long."""
        over: list[bool] = []
        self.after(seconds, lambda: over.append(True))
        self.wait_until(lambda: bool(over))

    def _turn(self) -> None:
        self.on_turn()
        self._forgive_pause()
        ready = self._wait(min(LONGEST_TURN_S, max(0.0, self._next_due() - time.monotonic())))
        for each in ready:
            if each in self._awaited:  # what was handled before may have had it forgotten
                self._handle(each)
        if not ready or time.monotonic() - self._deadlines_seen_at > DEADLINES_EVERY_S:
            self._check_deadlines()
        self._run_timers()

    def _wait(self, timeout_s: float) -> list[Any]:
        """Everything that has arrived, once anything has."""
        if not self._awaited:
            time.sleep(timeout_s)
            return []
        awaited = list(self._awaited)
        ready: list[Any]
        ready, _ = ray.wait(awaited, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and len(awaited) > 1:
            ready, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0, fetch_local=False)
        return ready

    def _handle(self, ready: Any) -> None:
        if isinstance(ready, ray.ObjectRefGenerator):
            self._handle_item(ready)
            return
        awaited = self._awaited.pop(ready)
        try:
            result = wait_for(Call(ready, awaited.worker, awaited.action), awaited.timeout_s)
        except RunError as error:
            awaited.on_failure(error)
        else:
            awaited.then(result)

    def _handle_item(self, stream: ray.ObjectRefGenerator) -> None:
        awaited = self._awaited[stream]
        awaited.since = time.monotonic()
        item = next(stream, None)
        if item is None:
            del self._awaited[stream]
            awaited.on_failure(_ended(awaited))
        else:
            awaited.then(item)

    def _next_due(self) -> float:
        """When the next deadline or timer is, on the monotonic clock."""
        now = time.monotonic()
        for awaited in self._awaited.values():
            if awaited.idle is not None and awaited.idle():
                awaited.since = now
        due = [each.since + each.timeout_s for each in self._awaited.values()]
        return min(due + [timer[0] for timer in self._timers[:1]], default=now + LONGEST_TURN_S)

    def _forgive_pause(self) -> None:
        """Where this process was stopped, what is awaited was not late in the meantime: no deadline ran.

        An answer that the worker had long since given may only arrive a moment after this process goes on.
        """
        now = time.monotonic()
        gap_s, self._listened_at = now - self._listened_at, now
        if gap_s > PAUSE_S:
            for each in self._awaited.values():
                each.since = min(now, each.since + gap_s)

    def _check_deadlines(self) -> None:
        """Fail what is late; not what has arrived meanwhile."""
        self._forgive_pause()
        self._deadlines_seen_at = now = time.monotonic()
        overdue = [
            ref
            for ref, each in self._awaited.items()
            if now >= each.since + each.timeout_s and not (each.idle and each.idle())
        ]
        if not overdue:
            return
        arrived, _ = ray.wait(overdue, num_returns=len(overdue), timeout=0, fetch_local=False)
        for ref in set(overdue) - set(arrived):
            awaited = self._awaited.pop(ref, None)  # a failure before it may have had it forgotten
            if awaited is not None:
                awaited.on_failure(late(awaited.worker, awaited.action, awaited.timeout_s))

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()


def _ended(stream: _Awaited) -> RunError:
    return WorkerLostError(f"{stream.worker} ended while it was to {stream.action}")
