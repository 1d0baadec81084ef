"""How often a worker may be started again, and how long to wait before."""

from __future__ import annotations

import time
from collections import deque

from rlhf_dist.config import RecoverySettings
from rlhf_dist.errors import RunError, WorkerError

LONGEST_BACKOFF_S = 60.0


class RestartBudget:
    """Restarts of one worker; beyond the limit the run stops and names the culprit.

    They are limited within a window, and since the run last made progress: a crash loop may be too slow for
    the window, where each restart repeats many steps, or ends at a deadline.
    """

    def __init__(self, settings: RecoverySettings, name: str) -> None:
        """Nothing is spent.

        Args:
            name: of the worker, or of what is started again with it: `learner`, for all of its ranks.
        """
        self._settings, self._name = settings, name
        self._restarts: deque[float] = deque()
        self._num_without_progress = 0

    def progressed(self) -> None:
        """The run got further: what was lost before was no crash loop."""
        self._num_without_progress = 0

    def spend(self, worker: str, error: RunError, *, now: float | None = None) -> float:
        """Count a restart; returns the seconds to wait before it: none the first time, then ever longer.

        Args:
            worker: that was lost.
            error: why it has to be started again.
            now: on any clock that only rises. None: the process's own.

        Raises:
            WorkerError: there were too many within `recovery.window_s`, or without progress.
        """
        now = time.monotonic() if now is None else now
        while self._restarts and self._restarts[0] <= now - self._settings.window_s:
            self._restarts.popleft()
        limit, window_s = self._settings.max_restarts, self._settings.window_s
        if len(self._restarts) >= limit:
            raise self._too_often(worker, f"within {window_s:g} s", error)
        if self._num_without_progress >= limit:
            raise self._too_often(worker, "without a learner step done meanwhile", error)
        self._restarts.append(now)
        self._num_without_progress += 1
        num_before = len(self._restarts) - 1
        if num_before == 0:
            return 0.0
        return min(self._settings.backoff_s * 2 ** (num_before - 1), LONGEST_BACKOFF_S)

    def _too_often(self, worker: str, when: str, error: RunError) -> WorkerError:
        what = "it" if worker == self._name else f"the {self._name}"
        limit = self._settings.max_restarts
        return WorkerError(
            f"{worker} was lost, and {what} has been started again {limit} times {when} "
            f"(recovery.max_restarts={limit}); mend the cause, then go on with "
            f"--resume. The last error: {error}"
        )
