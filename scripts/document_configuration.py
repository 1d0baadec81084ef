"""Writes docs/configuration.md from the settings classes: `python scripts/document_configuration.py`."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_dist import algorithms
from rlhf_dist.algorithms.base import AlgorithmSettings
from rlhf_dist.config import Config

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEADER = """# Configuration

One YAML file, a section a role. Every key can be set on the command line as `section.key=value`, entries of
a list by number (`reward.0.weight=2`). Unknown keys are errors. `rlhf-dist train FILE --dry-run` prints the
resolved tree.

*This page is made from the settings classes by `python scripts/document_configuration.py`.*
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_tables("", "", Config, written=set())]).rstrip() + "\n"


def _tables(path: str, title: str, section: type[BaseModel], *, written: set[str]) -> Iterator[str]:
    """The table of a section, less the rows that are `written` already, and those of the sections in it."""
    rows, below = [], []
    for name, field in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        inner = list(_sections(field.annotation))
        if inner:
            below.append((key, inner))
            continue
        default = "required" if field.is_required() else _default(field)
        text = " ".join((field.description or "").split())
        rows.append(f"| `{key}` | {_type(field.annotation)} | {default} | {text} |")
    rows = [row for row in rows if row not in written]
    if path and (rows or below):
        summary = (section.__doc__ or "").strip().splitlines()[0]
        yield f"## `{path}`{title}\n\n{summary}\n"
    if rows:
        yield "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])
    for key, inner in below:
        if inner[0] is AlgorithmSettings:
            yield from _algorithms(key)
            continue
        for one in inner:
            name = f": {one.__name__}" if len(inner) > 1 else title
            yield from _tables(key, name, one, written=written)


def _algorithms(path: str) -> Iterator[str]:
    """What all algorithms have, then of each what it adds or has another default for."""
    common = list(_tables(path, "", AlgorithmSettings, written=set()))
    yield from common
    rows = {line for table in common for line in table.splitlines() if line.startswith("| `")}
    for name in algorithms.algorithm_names():
        yield from _tables(path, f" of `{name}`", algorithms.settings_class(name), written=rows)


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif not isinstance(annotation, type) or typing.get_origin(annotation):
        for argument in typing.get_args(annotation):
            yield from _sections(argument)


def _default(field: FieldInfo) -> str:
    """As it would be written in YAML."""
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{argument}`" for argument in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if isinstance(annotation, types.UnionType):
        return " \\| ".join(_type(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return getattr(annotation, "__name__", str(annotation)).lower()


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
