"""The run folder: what lies where, and that one run owns it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.durable import sync_folder
from rlhf_dist.errors import ConfigError, RunError, StorageError
from rlhf_dist.experience.journal import JOURNAL_FOLDER
from rlhf_dist.experience.steps import STEPS_FILE

TRIAL_PREFIX = ".trial-"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

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
    def prompts(self) -> Path:
        """Fingerprint of the prompts that the run began with."""
        return self.root / "prompts.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What was lost and how it was recovered; see `observability.run_events`."""
        return self.root / "events.jsonl"

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
        """The trained policy, adapters merged."""
        return self.root / "policy"

    @property
    def policy_adapter(self) -> Path:
        """Its adapters alone, where there are any."""
        return self.root / "policy-adapter"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def journal(self) -> Path:
        """Scored experience and which learner step had it; see `experience.journal`."""
        return self.root / JOURNAL_FOLDER

    @property
    def marker(self) -> Path:
        """Says that the folder was made for a run, so that what is in it may be replaced."""
        return self.root / ".rlhf-dist-run"

    @contextmanager
    def owned(self, if_exists: IfExists) -> Iterator[None]:
        """Make the folder this process's own for the block. Nothing in it is deleted: see `clear`.

        Raises:
            ConfigError: another process runs in it, it holds a run already, it holds something else, or it
                cannot be made or locked.
            StorageError: nothing can be written in it.
        """
        with owned_folder(self.root, kind="run", marker=self.marker, remedy="set run.dir"):
            if if_exists == "refuse" and self.holds_run():
                raise ConfigError(
                    f"run folder {self.root} already holds a run; pass --resume to go on with it, "
                    "--overwrite to delete it, or set run.dir"
                )
            yield

    def holds_run(self) -> bool:
        """Whether a run got as far as a learner step here."""
        return self.checkpoints.exists() or bool(self.metrics.exists() and self.metrics.stat().st_size)

    def can_be_resumed(self) -> bool:
        """Whether a run got as far as generating here: what it generated is in the journal."""
        return self.holds_run() or (self.journal / STEPS_FILE).exists()

    def check_journal(self) -> None:
        """Have a run without a journal not taken for a folder that no run was made in.

        Raises:
            RunError: it has none yet, or has lost it.
        """
        if self.journal.is_dir() or not self.marker.exists():
            return
        if self.holds_run():
            raise RunError(
                f"run {self.root} has lost its folder {JOURNAL_FOLDER!r}, without which nobody knows what it "
                "was trained on; bring it back from a copy"
            )
        raise RunError(
            f"run {self.root} has no samples yet: it is still starting, or ended before there were any"
        )

    def clear(self) -> None:
        """Delete what an earlier run left here.

        Raises:
            StorageError: some of it cannot be deleted.
        """
        folders = (
            self.initial_policy,
            self.sft_policy,
            self.policy,
            self.policy_adapter,
            self.checkpoints,
            self.journal,
        )
        files = (self.metrics, self.events, self.answers, self.config, self.prompts)
        for path in (*folders, *files):
            try:
                if path in folders:
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(
                    f"{error.filename or path} of an earlier run cannot be deleted ({error.strerror}); "
                    "delete it, or set run.dir to a new folder"
                ) from error

    def read_answers(self) -> dict[str, list[str]]:
        """What `answers` has; no prompts where it is gone.

        Raises:
            StorageError: it is broken.
        """
        try:
            return json.loads(self.answers.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"prompts": [], "before": [], "after": []}
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self.answers} cannot be read ({error}); delete it to go on without sample answers"
            ) from error


@contextmanager
def owned_folder(root: Path, *, kind: str, marker: Path, remedy: str) -> Iterator[None]:
    """Make a folder this process's own for the block. Nothing in it is deleted.

    Args:
        kind: what such folders are made for, in a word.
        marker: the file in it that says so.
        remedy: how the user names another folder.

    Raises:
        ConfigError: another process has it, it holds something else, or it cannot be made or locked.
        StorageError: nothing can be written in it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _cannot_write(root, error) from error
        raise ConfigError(f"{kind} folder {root} cannot be written ({error.strerror}); {remedy}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{kind} folder {root} is in use by another {kind}; wait for it, or {remedy}"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{kind} folder {root} cannot be locked ({error.strerror}); {remedy} to a folder on a file "
                "system that has locks (flock)"
            ) from error
        strangers = [path.name for path in root.iterdir() if path.name != ".lock"]
        if strangers and not marker.exists():
            raise ConfigError(
                f"{kind} folder {root} is not empty and was not made for a {kind} (it has "
                f"{', '.join(sorted(strangers)[:3])}); {remedy} to a new folder"
            )
        try:
            marker.touch()
        except OSError as error:
            raise _cannot_write(marker, error) from error
        yield


@contextmanager
def trial_folder(root: Path) -> Iterator[Path]:
    """An empty folder in a run's folder, which is gone after the block.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(dir=root, prefix=TRIAL_PREFIX))
    except OSError as error:
        raise _cannot_write(root, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written ({error.strerror}); make room there, or let the run write there, then "
        "start it again"
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part.

    Raises:
        StorageError: it cannot be written; the old text is there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"{path} cannot be written ({error.strerror}); make room there, or let it be written"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of a JSON value."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
