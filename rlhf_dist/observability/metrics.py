"""`metrics.jsonl`: one JSON object a learner step, on disk before the next step begins."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.durable import read_json_lines, sync_folder
from rlhf_dist.errors import RunError, StorageError

Metrics = dict[str, Any]


class MetricsLog:
    """Appends steps to a file."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open the log, keeping what it has of the steps before `first_step` (those after were undone).

        Raises:
            RunError: a line before the last is broken.
            StorageError: it cannot be written.
        """
        self._path = path
        kept = [metrics for metrics in read_metrics(path) if metrics["step"] < first_step]
        self.missing_steps = sorted(set(range(first_step)) - {metrics["step"] for metrics in kept})
        """Steps before `first_step` that the file has lost."""
        temporary = path.with_suffix(".tmp")
        self._write(temporary, "w", kept)
        with self._writing():
            temporary.rename(path)
            sync_folder(path.parent)

    def append(self, metrics: Metrics) -> None:
        """Write one step.

        Raises:
            StorageError: it cannot be written.
        """
        self._write(self._path, "a", [metrics])

    def _write(self, path: Path, mode: Literal["w", "a"], steps: list[Metrics]) -> None:
        with self._writing(), path.open(mode, encoding="utf-8") as file:
            file.writelines(map(_line, steps))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written ({error.strerror}); make room, then go on with --resume"
            ) from error


def read_metrics(path: Path) -> list[Metrics]:
    """The steps of a log, oldest first; none if there is no log. A torn last line is left out.

    Raises:
        RunError: a line before the last is broken, or is of no step.
    """
    steps = read_json_lines(path).records
    for number, metrics in enumerate(steps, start=1):
        if not isinstance(metrics.get("step"), int):
            raise RunError(f"{path} line {number} is of no step: it was changed; delete the line")
    return steps


def _line(metrics: Metrics) -> str:
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"
