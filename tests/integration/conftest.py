"""Real runs as a person starts them: the command line in a process of its own, every engine real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
ORPHAN_DEADLINE_S = 10
RUN_DEADLINE_S = 500


@dataclass
class Run:
    """A finished command."""

    returncode: int
    output: str
    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


class RunningCommand:
    """`rlhf-dist train` under way, in a session of its own so that its processes can be told apart."""

    def __init__(
        self, folder: Path, arguments: tuple[str, ...], cwd: Path, launcher: tuple[str, ...]
    ) -> None:
        self.folder = folder
        self._log = folder.with_name(folder.name + ".log")
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "train", *arguments, f"run.dir={folder}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self) -> Run:
        returncode = self.process.wait(timeout=RUN_DEADLINE_S)
        return Run(returncode, self.output, self.folder)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output}"
            time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """Every living process of the command's session."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) == self.process.pid
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def assert_nothing_left(self, deadline_s: float = ORPHAN_DEADLINE_S) -> None:
        """No process of the run is alive `deadline_s` after its end."""
        deadline = time.monotonic() + deadline_s
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive, f"left behind: {[process.name() for process in alive]}"


Start = Callable[..., RunningCommand]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start the command with overrides; whatever a failing test leaves is killed at the end."""
    commands: list[RunningCommand] = []

    def begin(
        *arguments: str,
        config: Path = QUICKSTART,
        folder: Path | None = None,
        cwd: Path = REPOSITORY,
        launcher: tuple[str, ...] = ("-m", "rlhf_dist"),
    ) -> RunningCommand:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        commands.append(RunningCommand(folder, (str(config), *arguments), cwd, launcher))
        return commands[-1]

    yield begin
    for command in commands:
        for process in command.processes():
            process.kill()


@pytest.fixture(scope="session")
def train(start: Start) -> Callable[..., Run]:
    """Run the command to its end, and check that nothing of it is left."""

    def run(*arguments: str, **options: Any) -> Run:
        command = start(*arguments, **options)
        finished = command.wait()
        command.assert_nothing_left()
        return finished

    return run


@pytest.fixture(scope="session")
def quickstart(train: Callable[..., Run]) -> Callable[[int], Run]:
    """The quickstart as it is, once a seed."""
    runs: dict[int, Run] = {}

    def of_seed(seed: int) -> Run:
        if seed not in runs:
            runs[seed] = train(f"run.seed={seed}")
        return runs[seed]

    return of_seed


@pytest.fixture(scope="session")
def small(quickstart: Callable[[int], Run]) -> tuple[str, ...]:
    """Overrides for a short run that starts from the quickstart's supervised policy."""
    policy = quickstart(0).folder / "sft-policy"
    return (
        f"policy.model={policy}",
        "sft=null",
        "run.num_steps=3",
        "run.num_sample_answers=1",
        "rollout.prompts_per_step=16",
        "rollout.samples_per_batch=8",
        "algorithm.num_epochs=2",
    )
