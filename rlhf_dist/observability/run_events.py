"""`events.jsonl`: what was lost and how it was recovered, one JSON object a line.

    lost        role, worker, noticed, error, step
    recovered   role, worker, action, seconds, dispatched_again, scored_again, replayed_steps, step
    resumed     first_step, recorded_steps, step
    terminated  step, checkpoint

Every line has `time` (ISO 8601, UTC) and `event`. `step` is the learner step under way, `seconds` go from
when the loss was noticed until the role worked again. Each line `lost` is answered by a line `recovered`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_dist.durable import json_line, read_json_lines
from rlhf_dist.errors import StorageError


class RunEvents:
    """Appends to the file, and says each event to whoever watches the run. What cannot be written is a
    StorageError."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self.say = path, say
        _cut_torn_line(path)
        self.step = 0
        """The learner step under way."""

    def lost(self, role: str, worker: str, noticed: str, error: str) -> None:
        """A worker is gone."""
        self._write("lost", role=role, worker=worker, noticed=noticed, error=error)
        self.say(f"lost {worker}: {noticed}")

    def recovered(
        self,
        role: str,
        worker: str,
        action: str,
        seconds: float,
        *,
        dispatched_again: int = 0,
        scored_again: int = 0,
        replayed_steps: int = 0,
    ) -> None:
        """It is replaced, and works.

        Args:
            seconds: since it was noticed.
            dispatched_again: prompts that are generated once more.
            scored_again: batches that are scored once more.
            replayed_steps: learner steps that were done once more, from the journal.
        """
        counts = {
            "dispatched_again": dispatched_again,
            "scored_again": scored_again,
            "replayed_steps": replayed_steps,
        }
        self._write("recovered", role=role, worker=worker, action=action, seconds=round(seconds, 3), **counts)
        more = [f"{name.replace('_', ' ')}: {count}" for name, count in counts.items() if count]
        self.say(f"recovered {worker} in {seconds:.1f} s: {', '.join([action, *more])}")

    def resumed(self, first_step: int, recorded_steps: int) -> None:
        """A later process goes on with the run.

        Args:
            first_step: that it does, of the checkpoint that was loaded; 0 without one.
            recorded_steps: that the journal has from there on, and that are done once more.
        """
        self._write("resumed", first_step=first_step, recorded_steps=recorded_steps)

    def terminated(self, checkpoint: Path) -> None:
        """The run was told to end, and has written a last checkpoint."""
        self._write("terminated", checkpoint=checkpoint.name)

    def _write(self, event: str, **fields: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        line = json_line({"time": time, "event": event, "step": self.step} | fields)
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written ({error.strerror}); make room, then go on with --resume")


def _cut_torn_line(path: Path) -> None:
    """What a process that ended meanwhile had written of its last line."""
    if path.exists():
        try:
            os.truncate(path, path.stat().st_size - read_json_lines(path).num_torn_bytes)
        except OSError as error:
            raise _cannot_write(path, error) from error


def read_run_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none if there is no file. A torn last line is left out.

    Raises:
        RunError: a line before the last is broken.
    """
    return read_json_lines(path).records
