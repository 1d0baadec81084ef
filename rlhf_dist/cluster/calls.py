"""Calls to actors: every wait has a deadline and a name, every failure says which worker and which call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from rlhf_dist.errors import DeadlineError, RunError, WorkerError


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
        WorkerError: the worker died, or failed in any other way.
    """
    try:
        return ray.get(call.ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise DeadlineError(
            f"{call.worker} did not {call.action} within {timeout_s:g} s; "
            "it may be stuck or too slow: see its log, or raise the deadline in the section `cluster`"
        ) from error
    except RayError as error:
        raise explain(error, call.worker, call.action) from error


def wait_for_all(calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """The results of calls that run side by side; the first failure ends the wait.

    Raises:
        As `wait_for`.
    """
    pending = {call.ref: call for call in calls}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s)
        if not done:
            slow = next(iter(pending.values()))
            raise DeadlineError(
                f"{slow.worker} did not {slow.action} within {timeout_s:g} s "
                f"({len(pending)} of {len(calls)} calls were still open); raise the deadline in the section "
                "`cluster` if it is only slow"
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
    if isinstance(cause, RayError):
        return explain(cause, worker, action)
    if cause is not None:
        return WorkerError(f"{worker} failed to {action}: {type(cause).__name__}: {cause}")
    if isinstance(error, ActorDiedError | RayActorError):
        return WorkerError(f"{worker} died while it was to {action}: {_first_line(error)}")
    return WorkerError(f"{worker} failed to {action}: {type(error).__name__}: {_first_line(error)}")


def end(actors: Iterable[Any]) -> None:
    """Kill actors that are no longer needed."""
    for actor in actors:
        ray.kill(actor, no_restart=True)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
