"""A run under a schedule of kills: find the victims, wait for the moments, strike, start the driver again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from kills import TITLES, Kill, Role

from rlhf_dist.experience.journal import JOURNAL_FOLDER
from rlhf_dist.experience.steps import read_history
from rlhf_dist.observability.run_events import read_run_events

T = TypeVar("T")
METHOD_DEADLINE_S = 20
"""For a victim to begin with a method. Past it, the blow falls all the same."""
MOMENT_DEADLINE_S = 240
"""For a step, for a loss to be noticed, or for a role to have a process again."""
ENDING_DEADLINE_S = 90
"""For a driver that was told to end to have ended."""
ORPHANS_DEADLINE_S = 150
"""For Ray's own processes to be gone after their driver was killed: its agents count five looks at it."""
SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.02
TITLE_POLL_S = 0.001
"""Some methods take a few milliseconds."""
LONGEST_DELAY_IN_METHOD_S = 0.2
TERMINATED = 143


class MissedError(Exception):
    """The run had ended before a kill's moment came."""


@dataclass(frozen=True)
class Strike:
    """A blow that was struck."""

    kill: Kill
    at: float
    """Seconds since 1970."""
    title: str
    """The victim's, at that time."""
    num_steps: int
    """Done at that time."""
    newest_version: int
    """That a worker had proved by then; -1: none."""
    back_after_s: float | None = None
    """Where the command had to be started again: from the blow to the next step that was done."""


@dataclass
class Disturbed:
    """A run that went through a schedule."""

    folder: Path
    returncode: int
    output: str
    """Of its last process."""
    metrics: list[dict[str, Any]]
    strikes: list[Strike] = field(default_factory=list)
    missed: list[Kill] = field(default_factory=list)
    """Whose moment never came."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of `events.jsonl`."""
        return read_run_events(self.folder / "events.jsonl")


class StepClock:
    """Notes when each step of a run was done, beside everything else."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._seen: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> StepClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def time_of_more_than(self, num_steps: int, *, since: float) -> float | None:
        """When the file first had more steps; None: it never had."""
        return next((at for at, count in self._seen if at > since and count > num_steps), None)

    def _look(self) -> None:
        while not self._over.wait(POLL_S):
            count = count_lines(self._metrics)
            if not self._seen or self._seen[-1][1] != count:
                self._seen.append((time.time(), count))


def disturb(
    start: Callable[..., Any], arguments: Sequence[str], schedule: Sequence[Kill], **options: Any
) -> Disturbed:
    """Run `train` to its end through a schedule of kills; nothing of it is left when this returns.

    Args:
        options: of `start`.

    Raises:
        AssertionError: a process ended as it should not, or a deadline is past.
    """
    shared_memory = set(os.listdir(SHARED_MEMORY))
    commands = [start(*arguments, **options)]
    folder = commands[0].folder
    strikes: list[Strike] = []
    missed: list[Kill] = []
    with StepClock(folder / "metrics.jsonl") as clock:
        for kill in schedule:
            since = strikes[-1].at if strikes else 0.0
            try:
                victim = _await_moment(commands[-1], kill, since)
            except MissedError:
                missed.append(kill)
                continue
            strikes.append(_strike(commands[-1], kill, victim))
            print(f"{kill}: hit {strikes[-1].title} in step {strikes[-1].num_steps}", flush=True)
            if kill.ends_the_run:
                _await_end(commands[-1], kill)
                commands.append(start(*arguments, "--resume", **options | {"folder": folder}))
        run = commands[-1].wait()
        ended_at = time.time()
    for command in commands:
        command.assert_nothing_left(ORPHANS_DEADLINE_S)
    assert set(os.listdir(SHARED_MEMORY)) <= shared_memory
    strikes = [_with_return(strike, clock, ended_at) for strike in strikes]
    return Disturbed(folder, run.returncode, run.output, run.metrics, strikes, missed)


def title_of(pid: int) -> str:
    """A process's title; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""


def processes_of(command: Any, role: Role) -> list[psutil.Process]:
    """A role's living processes, by process id; none once the run has ended. The machine's are all of it."""
    if role == "driver":
        return [] if command.process.poll() is not None else [psutil.Process(command.process.pid)]
    found = sorted(command.processes(), key=lambda process: process.pid)
    if role == "machine":
        return found
    return [each for each in found if title_of(each.pid).split(".")[0] == TITLES[role]]


def count_lines(path: Path) -> int:
    """Whole lines of a file that may not be there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def time_of(event: dict[str, Any]) -> float:
    """Of a line of `events.jsonl`, in seconds since 1970."""
    return datetime.fromisoformat(event["time"]).timestamp()


def _await_moment(command: Any, kill: Kill, since: float) -> psutil.Process:
    """Wait for a kill's moment; returns the victim."""
    metrics, events = command.folder / "metrics.jsonl", command.folder / "events.jsonl"

    def until(condition: Callable[[], T], what: str) -> T:
        deadline = time.monotonic() + MOMENT_DEADLINE_S
        while not (found := condition()):
            if command.process.poll() is not None:
                raise MissedError(f"the run ended before {what}")
            assert time.monotonic() < deadline, f"no {what} in {MOMENT_DEADLINE_S} s:\n{command.output}"
            time.sleep(POLL_S)
        return found

    def was_noticed() -> bool:
        return any(each["event"] == "lost" and time_of(each) > since for each in read_run_events(events))

    until(lambda: count_lines(metrics) >= kill.after_steps, f"step {kill.after_steps}")
    if kill.during_recovery:
        until(was_noticed, "noticed loss")
    if kill.method is None:
        time.sleep(kill.delay_s)
    victims = until(lambda: processes_of(command, kill.role), f"process of the role {kill.role}")
    victim = victims[(kill.worker or 0) % len(victims)]
    if kill.method is not None:
        _await_title(victim.pid, f"{TITLES[kill.role]}.{kill.method}")
        time.sleep(min(kill.delay_s, LONGEST_DELAY_IN_METHOD_S))
    if command.process.poll() is not None:
        raise MissedError("the run ended meanwhile")
    return victim


def _await_title(pid: int, title: str) -> None:
    deadline = time.monotonic() + METHOD_DEADLINE_S
    while title_of(pid) not in (title, "") and time.monotonic() < deadline:
        time.sleep(TITLE_POLL_S)


def _strike(command: Any, kill: Kill, victim: psutil.Process) -> Strike:
    folder = command.folder
    num_steps, version = count_lines(folder / "metrics.jsonl"), _newest_version(folder)
    takes_all = kill.role == "machine" or kill.worker is None
    victims = processes_of(command, kill.role) if takes_all else [victim]
    strike = Strike(kill, time.time(), title_of(victim.pid), num_steps, version)
    for process in victims:
        try:
            process.send_signal(signal.Signals[kill.blow])
        except psutil.NoSuchProcess:
            continue  # it has ended by itself meanwhile
    return strike


def _await_end(command: Any, kill: Kill) -> None:
    run = command.wait(ENDING_DEADLINE_S)
    expected = {TERMINATED} if kill.blow == "SIGTERM" else {-signal.SIGKILL}
    if (command.folder / "policy").exists():
        expected |= {0, -signal.SIGTERM}  # it was done, and Ray was just being shut down
    if kill.blow == "SIGTERM" and not run.output:
        expected.add(-signal.SIGTERM)  # it had only been started, and was still importing
    assert run.returncode in expected, f"{kill} ended with {run.returncode}:\n{run.output}"


def _with_return(strike: Strike, clock: StepClock, ended_at: float) -> Strike:
    if not strike.kill.ends_the_run:
        return strike
    back_at = clock.time_of_more_than(strike.num_steps, since=strike.at) or ended_at
    return Strike(**vars(strike) | {"back_after_s": back_at - strike.at})


def _newest_version(folder: Path) -> int:
    served = read_history(folder / JOURNAL_FOLDER).served
    return max((record["version"] for record in served), default=-1)
