"""The run folder: what lies where, and that one run owns it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.errors import ConfigError

IfExists = Literal["refuse", "overwrite", "resume"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. `root` is absolute, since workers have other working directories."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def answers(self) -> Path:
        """Sample prompts with the answers before and after."""
        return self.root / "answers.json"

    @property
    def initial_policy(self) -> Path:
        """The untrained model of a built-in task."""
        return self.root / "initial-policy"

    @property
    def sft_policy(self) -> Path:
        """What the supervised stage made."""
        return self.root / "sft-policy"

    @property
    def policy(self) -> Path:
        """The trained policy."""
        return self.root / "policy"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def marker(self) -> Path:
        """Says that the folder was made for a run, so that what is in it may be replaced."""
        return self.root / ".rlhf-dist-run"

    @contextmanager
    def owned(self, if_exists: IfExists) -> Iterator[None]:
        """Make the folder this process's own for the block. Nothing in it is deleted: see `clear`.

        Raises:
            ConfigError: another process runs in it, it holds a run already, it holds something else, or it
                cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"run folder {self.root} cannot be written ({error.strerror}); set run.dir"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"run folder {self.root} is in use by another run; wait for it, or set run.dir"
                ) from error
            self._claim(if_exists)
            yield

    def holds_run(self) -> bool:
        """Whether a run got as far as a learner step here."""
        return self.checkpoints.exists() or bool(self.metrics.exists() and self.metrics.stat().st_size)

    def clear(self) -> None:
        """Delete what an earlier run left here."""
        for path in (self.initial_policy, self.sft_policy, self.policy, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.metrics, self.answers, self.config):
            path.unlink(missing_ok=True)

    def _claim(self, if_exists: IfExists) -> None:
        strangers = [path.name for path in self.root.iterdir() if path.name != ".lock"]
        if strangers and not self.marker.exists():
            raise ConfigError(
                f"run folder {self.root} is not empty and was not made for a run (it has "
                f"{', '.join(sorted(strangers)[:3])}); set run.dir to a new folder"
            )
        self.marker.touch()
        if if_exists == "refuse" and self.holds_run():
            raise ConfigError(
                f"run folder {self.root} already holds a run; pass --resume to go on with it, "
                "--overwrite to delete it, or set run.dir"
            )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of a JSON value."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
