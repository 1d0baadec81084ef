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
from filelock import FileLock

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
ORPHAN_DEADLINE_S = 10
RUN_DEADLINE_S = 500


def pytest_addoption(parser: pytest.Parser) -> None:
    """The tests that continuous integration has no time for: `make test ARGS=--long`."""
    parser.addoption("--long", action="store_true", help="Also the tests that are marked long.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip those, unless they were asked for."""
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="a long one: make test ARGS=--long"))


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
    """A command under way, in a session of its own so that its processes can be told apart."""

    def __init__(
        self,
        folder: Path,
        arguments: tuple[str, ...],
        *,
        cwd: Path,
        launcher: tuple[str, ...],
        inside: tuple[str, ...],
        environment: dict[str, str],
    ) -> None:
        self.folder = folder
        self._log = unused(folder.with_name(folder.name + ".log"))
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*inside, sys.executable, *launcher, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=inherited | environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self, timeout_s: float = RUN_DEADLINE_S) -> Run:
        try:
            returncode = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still going after {timeout_s} s:\n{self.output}") from error
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


def unused(path: Path) -> Path:
    """The path itself, or one beside it where an earlier command on the same folder had that one."""
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.stem.split('~')[0]}~{number}{path.suffix}")
    return path


Start = Callable[..., RunningCommand]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start `train`, a bench or a replay, with overrides; what a failing test leaves is killed at the end."""
    commands: list[RunningCommand] = []

    def begin(
        *arguments: str,
        config: Path = QUICKSTART,
        folder: Path | None = None,
        cwd: Path = REPOSITORY,
        launcher: tuple[str, ...] = ("-m", "rlhf_dist"),
        inside: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        bench: str | None = None,
        replay: Path | None = None,
    ) -> RunningCommand:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        if replay is not None:
            command = ("replay", str(replay), *arguments)
        elif bench is not None:
            command = ("bench", bench, str(config), *arguments, "--out", str(folder))
        else:
            command = ("train", str(config), *arguments, f"run.dir={folder}")
        options = {"cwd": cwd, "launcher": launcher, "inside": inside, "environment": environment or {}}
        commands.append(RunningCommand(folder, command, **options))
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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all processes that tests run in side by side."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def train_once(train: Callable[..., Run], shared_folder: Path) -> Callable[..., Run]:
    """Run the command once for all of them, in a folder of the given name."""

    def run(name: str, *arguments: str, **options: Any) -> Run:
        folder, result = shared_folder / name, shared_folder / f"{name}.json"
        with FileLock(shared_folder / f"{name}.lock"):
            if not result.exists():
                finished = train(*arguments, folder=folder, **options)
                result.write_text(json.dumps([finished.returncode, finished.output]))
        returncode, output = json.loads(result.read_text())
        return Run(returncode, output, folder)

    return run


@pytest.fixture(scope="session")
def quickstart(train_once: Callable[..., Run]) -> Run:
    """The quickstart as it is."""
    return train_once("quickstart")


@pytest.fixture(scope="session")
def small(quickstart: Run) -> tuple[str, ...]:
    """Overrides for a short run that starts from the quickstart's supervised policy."""
    policy = quickstart.folder / "sft-policy"
    return (
        f"policy.model={policy}",
        "sft=null",
        "run.num_steps=3",
        "run.num_sample_answers=1",
        "rollout.prompts_per_step=16",
        "rollout.samples_per_batch=8",
        "algorithm.num_epochs=2",
    )


@pytest.fixture(scope="session")
def lean(small: tuple[str, ...]) -> tuple[str, ...]:
    """The same with one worker of each role, which start sooner."""
    return (*small, "rollout.num_workers=1", "learner.num_workers=1")
