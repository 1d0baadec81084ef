"""Runs of the main job, each in a process of its own, that a bench starts, waits for and reads.

Beside the run folder lie the run's settings (`.yaml`) and everything that it printed (`.log`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config import Config, differences, load_config, to_yaml
from rlhf_dist.driver.run_folder import RunFolder, write_atomically
from rlhf_dist.errors import ConfigError
from rlhf_dist.observability.metrics import Metrics, read_metrics

ENDING_TIMEOUT_S = 60
"""From asking a run's process to end to killing it."""


@dataclass(frozen=True)
class Run:
    """One run of `rlhf-dist train`; `config.run.dir` is its folder, and no other run's."""

    config: Config

    @property
    def folder(self) -> RunFolder:
        """Where it leaves what it makes."""
        return RunFolder(self.config.run.dir)

    @property
    def log(self) -> Path:
        """Everything that it printed."""
        return self.config.run.dir.with_suffix(".log")

    @property
    def metrics(self) -> list[Metrics]:
        """Of its steps so far."""
        return read_metrics(self.folder.metrics)

    def is_complete(self) -> bool:
        """Whether it has been done to its end. The answers after training are the last that a run writes."""
        answers = self.folder.answers
        return (
            len(self.metrics) == self.config.run.num_steps
            and answers.exists()
            and "after" in json.loads(answers.read_text(encoding="utf-8"))
        )

    def other_settings(self) -> list[str]:
        """Keys in which the run that the folder holds differs from this one; none if it holds none.

        Keys that the program has got since then count with their defaults.
        """
        if not self.folder.holds_run():
            return []
        try:
            held = load_config(self.folder.config)
        except ConfigError:
            return ["a key that is no longer known"]
        found = differences(held.model_dump(mode="json"), self.config.model_dump(mode="json"))
        return [each.key for each in found]

    def check(self) -> None:
        """Refuse to reuse, or to delete, a run of other settings.

        Raises:
            ConfigError: naming the settings.
        """
        other = self.other_settings()
        if other:
            raise ConfigError(
                f"{self.folder.root} holds a run with other settings ({', '.join(other[:3])}); delete that "
                "folder to do the run again, or name another bench folder"
            )

    def do(self, *, timeout_s: float) -> str | None:
        """Do the run, or what an interruption left of it to do. Returns what it failed with.

        Waits for the run's process, which keeps the deadlines of its section `cluster`, for at most
        `timeout_s`. Whatever ends the wait ends the process.
        """
        settings = self.config.run.dir.with_suffix(".yaml")
        settings.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings, to_yaml(self.config))
        command = [sys.executable, "-m", "rlhf_dist", "train", str(settings)]
        command.append("--resume" if self.folder.holds_run() else "--overwrite")
        with self.log.open("w", encoding="utf-8") as log:
            # In a process group of its own, so that Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
            ask_to_end = signal.SIGTERM
            try:
                code = process.wait(timeout_s)
            except KeyboardInterrupt:
                ask_to_end = signal.SIGINT
                raise
            except subprocess.TimeoutExpired:
                return f"did not end within {timeout_s:g} s"
            finally:
                _end(process, ask_to_end)
        return None if code == 0 else self._last_error(code)

    def _last_error(self, code: int) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        if errors := [line for line in lines if line.startswith("error:")]:
            return errors[-1].removeprefix("error: ")
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return next((line for line in reversed(lines) if line), f"exit code {code}, without a word")


def _end(process: subprocess.Popen, ask: signal.Signals) -> None:
    """End a run's process, unless it has ended; its workers go with it."""
    if process.poll() is not None:
        return
    process.send_signal(ask)
    try:
        process.wait(ENDING_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
