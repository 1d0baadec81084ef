"""Turns the name of a data source into rows: a file, a task of this project, or a `datasets` name or folder.

A name that looks like a path is never looked up on the hub.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.data.files import FILE_SUFFIXES, JSON_SUFFIXES, Row, read_json_lines, read_parquet
from rlhf_dist.errors import DataError

TASK_PREFIX = "task:"
TASKS_PACKAGE = "rlhf_dist.tasks"
# What `save_to_disk` writes beside the data, for one split and for several.
SAVED_MARKERS = ("state.json", "dataset_dict.json")

Kind = Literal["prompts", "demonstrations"]


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their source, and where in it each one stands."""

    source: str
    rows: list[Row]
    line_numbers: list[int] | None = None
    """Lines of a JSON Lines file, counted from 1; None: the source has rows only."""

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where row `index` is, for messages: `prompts.jsonl line 17`, `prompts.parquet row 16 (from 0)`."""
        if self.line_numbers is None:
            return f"{self.source} row {index} (from 0)"
        return f"{self.source} line {self.line_numbers[index]}"

    def value(self, index: int, column: str, *, setting: str) -> Any:
        """The row's value in `column`; `setting` is the configuration key that named the column."""
        row = self.rows[index]
        if column not in row:
            raise DataError(
                f"{self.place(index)}: no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}"
                f"{_did_you_mean(column, row)}; set {setting} or fix the row"
            )
        return row[column]


def read_rows(
    source: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    limit: int | None = None,
    kind: Kind = "prompts",
) -> Rows:
    """The first `limit` rows of `source`; `kind` is what a task is asked for. Nothing there: `DataError`."""
    if source.startswith(TASK_PREFIX):
        rows = Rows(source, list(islice(task_function(source, kind)(split), limit)))
    elif _looks_like_file(source):
        rows = _file_rows(source, limit)
    else:
        rows = Rows(source, _datasets_rows(source, split, config_name, limit))
    if not rows:
        raise DataError(f"{source}: it has no rows; name a source with at least one")
    return rows


def check_source(source: str, *, kind: Kind = "prompts") -> None:
    """Make sure that a task or a file is there, without reading it; not there: `DataError`.

    The name of a data set is not looked up.
    """
    if source.startswith(TASK_PREFIX):
        task_function(source, kind)
    elif _looks_like_file(source):
        _check_file(source)


def _looks_like_file(source: str) -> bool:
    path = Path(source).expanduser()
    if path.is_dir():
        return False
    return (
        path.exists()
        or source.lower().endswith(FILE_SUFFIXES)
        or source.startswith(("/", ".", "~"))
        or source.count("/") > 1
    )


def _file_rows(source: str, limit: int | None) -> Rows:
    _check_file(source)
    path = Path(source).expanduser()
    if source.lower().endswith(JSON_SUFFIXES):
        numbered = read_json_lines(path, name=source, limit=limit)
        return Rows(source, [each.row for each in numbered], [each.line_number for each in numbered])
    return Rows(source, read_parquet(path, name=source, limit=limit))


def _check_file(source: str) -> None:
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"{source}: no such file or folder{_neighbour(path)}; "
            f"correct the path (relative ones start at {Path.cwd()})"
        )
    if not source.lower().endswith(FILE_SUFFIXES):
        raise DataError(
            f"{source}: not a kind of file that is read; convert it to {', '.join(FILE_SUFFIXES)}"
        )


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    return _did_you_mean(path.name, (each.name for each in path.parent.iterdir()))


def task_function(source: str, function: str) -> Callable[..., Any]:
    """What task `source` (`task:NAME`) offers under the name `function`; nothing: `DataError`."""
    name = source.removeprefix(TASK_PREFIX).replace("-", "_")
    found = _function_of(name, function) if name in _task_modules() else None
    if found is None:
        tasks = task_names(function)
        raise DataError(
            f"{source}: no task of this name has {function}{_did_you_mean(name, tasks)}; "
            f"name one that has: {', '.join(tasks) or '(there are none)'}"
        )
    return found


def task_names(function: str) -> list[str]:
    """Names that `task:NAME` takes: the modules of the tasks package that have `function`."""
    return [name for name in _task_modules() if _function_of(name, function)]


def _task_modules() -> list[str]:
    package = importlib.import_module(TASKS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _function_of(name: str, function: str) -> Callable[..., Any] | None:
    return getattr(importlib.import_module(f"{TASKS_PACKAGE}.{name}"), function, None)


def _datasets_rows(source: str, split: str, config_name: str | None, limit: int | None) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    try:
        if any((path / marker).exists() for marker in SAVED_MARKERS):
            dataset = _split_of(datasets.load_from_disk(str(path)), source, split)
        else:
            dataset = datasets.load_dataset(str(path), config_name, split=split)
    # What `datasets` raises for an unknown name, split or configuration, a network failure, a broken file.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{source}: not a file here, and not a data set that can be loaded (split {split!r}, "
            f"configuration {config_name!r}): {reason}; correct the name, split or configuration"
        ) from error
    return list(dataset.select(range(min(limit or len(dataset), len(dataset)))))


def _split_of(saved: Any, source: str, split: str) -> Any:
    """A saved folder holds one unnamed data set, or one a split."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise DataError(
            f"{source}: no split {split!r}; it has {', '.join(saved)}; set the split to one of them"
        )
    return saved[split]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
