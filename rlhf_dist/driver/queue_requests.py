"""Calls to the experience queue that survive its actor: what it had not answered is asked again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import Events, Handler, raise_it
from rlhf_dist.cluster.experience_queue import QUEUE
from rlhf_dist.errors import RunError, WorkerLostError


class Answer:
    """What a call will be answered with. It is asked once, however often somebody begins to wait for it."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._answers: list[Any] = []

    def arrived(self, answer: Any) -> None:
        """It is there."""
        self._answers.append(answer)

    def wait(self) -> Any:
        """Wait for it, while everything else goes on."""
        self._events.wait_until(lambda: bool(self._answers))
        return self._answers[0]


Make = Callable[[], Call]
"""Makes a call to the actor that there is now."""


@dataclass(frozen=True)
class _Request:
    make: Make
    then: Handler
    timeout_s: float


class QueueRequests:
    """What the queue was asked and has not answered, in the order in which it was asked.

    Nothing is sent before the first `release`: an actor may come to a call before it comes to its `start`.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._numbers = itertools.count()
        self._open: dict[int, _Request] = {}
        self._is_held = True
        self.on_lost: Callable[[RunError], None] = raise_it
        """Called when the actor is gone; whoever replaces it calls `hold`, and later `release`."""

    def ask(self, make: Make, then: Handler = lambda _: None, *, timeout_s: float) -> None:
        """Have `then` called with the answer."""
        number = next(self._numbers)
        self._open[number] = _Request(make, then, timeout_s)
        if not self._is_held:
            self._send(number)

    def begin(self, make: Make, *, timeout_s: float) -> Answer:
        """What a call will be answered with."""
        answer = Answer(self._events)
        self.ask(make, answer.arrived, timeout_s=timeout_s)
        return answer

    def hold(self) -> None:
        """Wait for no answer of the actor that is gone, and ask nothing before there is another."""
        self._is_held = True
        self._events.forget(QUEUE)

    def release(self, before: Callable[[], None] = lambda: None) -> None:
        """The actor, the first one or a new one, has started: ask it what was not answered.

        Args:
            before: asks what it has to know first.
        """
        self._is_held = False
        unanswered = list(self._open)
        before()
        for number in unanswered:
            self._send(number)

    def _send(self, number: int) -> None:
        request = self._open[number]

        def then(answer: Any) -> None:
            del self._open[number]
            request.then(answer)

        self._events.expect(request.make(), then, request.timeout_s, on_failure=self._failed)

    def _failed(self, error: RunError) -> None:
        """Only a dead actor is replaced: what it answers, or waits for too long, is not its own fault."""
        if not isinstance(error, WorkerLostError):
            raise error
        self.on_lost(error)
