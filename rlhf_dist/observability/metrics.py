"""`metrics.jsonl`: one JSON object a learner step, on disk before the next step begins."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]


class MetricsLog:
    """Appends steps to a file."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open the log, keeping what it has of the steps before `first_step` (those after were undone)."""
        self._path = path
        kept = [metrics for metrics in read_metrics(path) if metrics["step"] < first_step]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(metrics) for metrics in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    def append(self, metrics: Metrics) -> None:
        """Write one step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(metrics))
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[Metrics]:
    """The steps of a log, oldest first; none if there is no log. A torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(metrics: Metrics) -> str:
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"
