"""Calls to actors: every wait has a deadline and a name, every failure says which worker and which call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from rlhf_dist.errors import DataLostError, DeadlineError, RunError, WorkerError, WorkerLostError

PROCESS_LOST = (RayActorError, NodeDiedError, WorkerCrashedError)
TASK_LOST = (NodeDiedError, WorkerCrashedError, TaskUnschedulableError)
"""Behind the error of a call: of the task that was to make what the call reads."""

REMEDY = (
    "--verbose shows the workers' output, which also is in the logs of Ray's session (by default "
    "/tmp/ray/session_latest/logs); --resume goes on from the last checkpoint, if there is one"
)


@dataclass(frozen=True)
class Call:
    """A call under way."""

    ref: ray.ObjectRef
    worker: str
    """Name of the worker, as in `rollout worker 1`."""
    action: str
    """What it is doing, as in `load weights`."""


def wait_for(call: Call, timeout_s: float) -> Any:
    """The call's result.

    Raises:
        DeadlineError: it did not come in time.
        RunError: the user's error that the worker met, as it was raised there.
        WorkerLostError: the worker died.
        WorkerError: it failed in any other way.
    """
    try:
        return ray.get(call.ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise late(call.worker, call.action, timeout_s) from error
    except RayError as error:
        raise explain(error, call.worker, call.action) from error


def wait_for_all(calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """The results of calls that run side by side; the first failure ends the wait.

    Raises:
        As `wait_for`.
    """
    deadline = time.monotonic() + timeout_s
    pending = {call.ref: call for call in calls}
    while pending:
        remaining_s = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=1, timeout=remaining_s)
        if not done:
            waiting = next(iter(pending.values()))
            raise late(
                waiting.worker, waiting.action, timeout_s, f"{len(pending)} of {len(calls)} calls are open"
            )
        wait_for(pending.pop(done[0]), timeout_s)
    return [ray.get(call.ref) for call in calls]


def explain(error: RayError, worker: str, action: str) -> RunError:
    """What a failed call means, as one message."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, RunError):
        return cause
    if isinstance(cause, TASK_LOST):
        return _data_lost(cause, worker, action)
    if isinstance(cause, RayError):
        return explain(cause, worker, action)
    if cause is not None:
        return WorkerError(f"{worker} failed to {action}: {type(cause).__name__}: {cause}; {REMEDY}")
    if isinstance(error, PROCESS_LOST):
        return WorkerLostError(
            f"{worker} died while it was to {action}: {_first_line(error)} It was killed, by hand or for "
            f"want of memory, or it crashed; {REMEDY}"
        )
    if isinstance(error, ObjectLostError):
        return _data_lost(error, worker, action)
    return WorkerError(f"{worker} failed to {action}: {type(error).__name__}: {_first_line(error)}; {REMEDY}")


def _data_lost(error: RayError, worker: str, action: str) -> DataLostError:
    return DataLostError(
        f"{worker} could not {action}, since what it was to read is gone with another process or node: "
        f"{_first_line(error)}; {REMEDY}"
    )


def late(worker: str, action: str, timeout_s: float, more: str = "") -> DeadlineError:
    """The error of a call that is past its deadline."""
    deadline = "that deadline" if "_timeout_s)" in action else "the deadline in the section `cluster`"
    return DeadlineError(
        f"{worker} did not {action} within {timeout_s:g} s{more and f' ({more})'}; "
        f"it may be stuck, or too slow for {deadline}; {REMEDY}"
    )


def facts_of(error: RunError) -> str:
    """The message of an error that does not end the run: without what to do about its end."""
    return str(error).removesuffix(f"; {REMEDY}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
