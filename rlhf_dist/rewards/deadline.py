"""A deadline for calls of code that nobody can interrupt: they run in a thread that can be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Generic, TypeVar

Result = TypeVar("Result")


def called(function: Callable[[], Result], into: Future[Result] | None = None) -> Future[Result]:
    """What a function returned or raised."""
    future: Future[Result] = Future() if into is None else into
    try:
        future.set_result(function())
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
    return future


class HelperThread(Generic[Result]):
    """Runs calls one after the other, all in the same thread, which does not keep the process alive.

    The same one, so that what a call keeps for its thread (a connection, say) is there for the next.
    """

    def __init__(self, name: str) -> None:
        """Start the thread."""
        self._calls: SimpleQueue[tuple[Callable[[], Result], Future[Result]]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def called(self, function: Callable[[], Result], timeout_s: float) -> Future[Result]:
        """As the function above; the future is not done where the function takes longer."""
        future: Future[Result] = Future()
        self._calls.put((function, future))
        wait([future], timeout_s)
        return future

    def _run(self) -> None:
        while True:
            called(*self._calls.get())
