"""Reads JSON Lines and parquet files into rows (dicts), and says where a broken file is broken."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_dist.errors import DataError

Row = dict[str, Any]

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = JSON_SUFFIXES + PARQUET_SUFFIXES


class NumberedRow(NamedTuple):
    """A row of a JSON Lines file and the line it stands on, counted from 1."""

    line_number: int
    row: Row


def read_json_lines(path: Path, *, name: str, limit: int | None) -> list[NumberedRow]:
    """Rows of a JSON Lines file, gzipped or not; blank lines are passed over. `name` is for messages."""
    return list(islice(_numbered_rows(path, name), limit))


def _numbered_rows(path: Path, name: str) -> Iterator[NumberedRow]:
    for line_number, line in _numbered_lines(path, name):
        if line.strip():
            yield NumberedRow(line_number, _parse(line, f"{name} line {line_number}"))


def _numbered_lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    line_number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                yield line_number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{name}: cannot be read after line {line_number} ({error}); write or download the file again"
        ) from error


def _parse(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}); {_json_remedy(line)}"
        ) from error
    if not isinstance(row, dict):
        kind = "array" if isinstance(row, list) else type(row).__name__
        raise DataError(f"{place}: a JSON {kind} where an object is needed; {_json_remedy(line)}")
    return row


def _json_remedy(line: bytes) -> str:
    if line.lstrip().startswith(b"["):
        return "the file needs one object a line, not an array: jq -c '.[]' OLD > NEW"
    if line.strip() == b"{":
        return "the file needs each object on one line: jq -c . OLD > NEW"
    return "fix or remove the line"


def read_parquet(path: Path, *, name: str, limit: int | None) -> list[Row]:
    """Rows of a parquet file, at most `limit`, without reading further than those."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches()
            return list(islice((row for batch in batches for row in batch.to_pylist()), limit))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name}: cannot be read as parquet ({reason}); write or download the file again"
        ) from error
