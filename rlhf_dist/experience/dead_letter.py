"""Prompts that were given up, for a person to look at: `dead-letter.jsonl` in the journal's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from rlhf_dist.durable import JsonLinesLog, Record, read_json_lines

DEAD_LETTER_FILE = "dead-letter.jsonl"


class DeadLetters:
    """Writes the file. Append before the ledger's record of a failure is written: then none is missing."""

    def __init__(self, folder: Path, *, wait_s: float = 0.0) -> None:
        """Nothing is made before the first letter.

        Args:
            folder: of the journal.
            wait_s: as of `JsonLinesLog`.
        """
        self.path = folder / DEAD_LETTER_FILE
        self._wait_s = wait_s
        self._lines: JsonLinesLog | None = None

    def append(self, ordinal: int, reasons: Sequence[str], *, row: int, prompts: pa.Table) -> None:
        """Write down a prompt, its row of the data set and why it was given up.

        Args:
            reasons: one for each attempt that was lost or failed, and those that it was given up for.
            prompts: the tokenized data set.

        Raises:
            RunError: the file cannot be written, or another process writes it.
        """
        if self._lines is None:
            self._lines = JsonLinesLog(self.path, wait_s=self._wait_s)
        prompt, columns = (prompts[name][row].as_py() for name in ("prompt", "columns"))
        self._lines.append(
            [
                {
                    "ordinal": ordinal,
                    "row": row,
                    "reasons": list(reasons),
                    "prompt": prompt,
                    "columns": json.loads(columns),
                }
            ]
        )

    def close(self) -> None:
        """Let another process write it."""
        if self._lines is not None:
            self._lines.close()


def read_dead_letters(folder: Path) -> list[Record]:
    """One record a prompt, the last one where a crash came in between two."""
    return list(
        {record["ordinal"]: record for record in read_json_lines(folder / DEAD_LETTER_FILE).records}.values()
    )
