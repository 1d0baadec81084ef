"""Files with a JSON object a line, of which a crash may have torn the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.errors import RunError


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file, and the bytes that they take; a missing file has none.

    A last line counts only if it is whole: its end may be missing, or be there before its other bytes are.
    Lines end with a newline alone; other separators, such as U+2028, may be in a text.

    Raises:
        RunError: a line before the last is broken.
    """
    if not path.exists():
        return [], 0
    *lines, _ = path.read_bytes().split(b"\n")
    objects: list[dict[str, Any]] = []
    num_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path} line {number} is broken: {line[:80]!r}") from error
        num_bytes += len(line) + 1
    return objects, num_bytes
