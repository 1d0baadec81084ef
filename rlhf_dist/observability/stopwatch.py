"""Seconds a phase, each second counted once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Phases may nest; time counts for the innermost one only."""

    def __init__(self, on_phase: Callable[[str], None] = lambda _: None) -> None:
        """Args: on_phase: called with the phase's name whenever another one begins to count."""
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time for `name`."""
        self._charge()
        self._open.append(name)
        self._on_phase(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            if self._open:
                self._on_phase(self._open[-1])

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _charge(self) -> None:
        now = time.monotonic()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
