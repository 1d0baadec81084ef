"""SIGTERM, as a preempted machine sends it: the step under way, a last checkpoint, then the end, in time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlhf_dist.errors import TerminatedError

SAY_TIMEOUT_S = 1.0
"""For a line on stderr, which nobody may read any more."""


class Termination:
    """Whether the run was told to end: at once while it waits for experience, else after the step."""

    def __init__(self, *, grace_period_s: float) -> None:
        """Args: grace_period_s: after the signal, until the process ends whatever it is doing."""
        self._grace_period_s = grace_period_s
        self._asked = self._interruptible = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take SIGTERM for the block."""
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            if not self._asked:
                signal.signal(signal.SIGTERM, before)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that may be left at any time."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def check(self) -> None:
        """Raises TerminatedError if the run was told to end."""
        if self._asked:
            raise TerminatedError("terminated")

    def check_if_interruptible(self) -> None:
        """`check`, where the block that is under way may be left."""
        if self._interruptible:
            self.check()

    def _on_signal(self, *_: object) -> None:
        if self._asked:
            return
        self._asked = True
        watchdog = threading.Timer(self._grace_period_s, self._give_up)
        watchdog.daemon = True
        watchdog.start()
        _say(f"terminated: a last checkpoint within {self._grace_period_s:g} s (recovery.grace_period_s)")

    def _give_up(self) -> None:
        _say(
            f"terminated: the grace period of {self._grace_period_s:g} s is over, so nobody waits for "
            "the last checkpoint any more; --resume goes on from the newest one and repeats the steps since"
        )
        os._exit(TerminatedError.exit_code)


def _say(text: str) -> None:
    """Print to stderr, in a thread of its own: a closed one, or a pipe that is full, holds nothing up."""
    printing = threading.Thread(target=_print, args=(text,), daemon=True)
    printing.start()
    printing.join(SAY_TIMEOUT_S)


def _print(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
