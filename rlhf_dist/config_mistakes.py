"""What pydantic finds wrong with a configuration, in the words of whoever wrote it.

A line for each mistake: the key as it is written, its value, and what it should be; for an unknown key the
nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import yaml
from pydantic import BaseModel

from rlhf_dist.algorithms.base import AlgorithmSettings

SECTION_EXPECTED = ("model_type", "model_attributes_type")
LIST_EXPECTED = ("tuple_type", "list_type")
ENTRIES_EXPECTED = {"too_short": ("least", "min_length"), "too_long": ("most", "max_length")}
"""Kinds of problems that pydantic describes in the words of Python."""


class Mistakes:
    """Explains the problems of one configuration."""

    def __init__(self, root: type[BaseModel], algorithm: Sequence[type[AlgorithmSettings]]) -> None:
        """Take what the configuration may hold.

        Args:
            root: its sections.
            algorithm: what its section `algorithm` may be.
        """
        self._root, self._algorithm = root, algorithm
        self._known = list(self._keys_of(root))

    def explained(self, problems: Iterable[Any]) -> Iterator[str]:
        """A line for each thing that is wrong. A value of none of a key's types is one thing, not one a type.

        Args:
            problems: as pydantic lists them.
        """
        for location, group in groupby(problems, key=self._key_of_several_types):
            if location is None:
                yield from (self._explain(problem) for problem in group)
                continue
            tried = list(group)
            value = min(tried, key=lambda problem: len(problem["loc"]))["input"]  # not a part of it
            names = dict.fromkeys(_location(problem["loc"])[len(location)] for problem in tried)
            expected = " or ".join(name.replace("tuple", "list") for name in names)
            yield f"{'.'.join(location)}={value!r}: input should be {expected}"

    def _key_of_several_types(self, problem: Any) -> list[str] | None:
        """The key, where a problem is with one of several types that it may have: pydantic adds the type."""
        location = _location(problem["loc"])
        names: list[str] = []
        for depth, part in enumerate(location):
            names += [] if part.isdigit() else [part]
            if ".".join(names) not in self._known:
                return None if problem["type"] == "extra_forbidden" else location[:depth]
        return None

    def _explain(self, problem: Any) -> str:
        location = _location(problem["loc"])
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            return f"unknown key {key}{_nearest(location, self._known)}"
        if problem["type"] == "missing":
            return f"{key} is missing"
        if problem["type"] == "value_error":
            return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        return f"{key}={problem['input']!r}: {self._expected(problem, location)}"

    def _expected(self, problem: Any, location: list[str]) -> str:
        """What a value should be, in the words of YAML."""
        if problem["type"] in SECTION_EXPECTED:
            return f"input should be a section of keys and values, as in {self._example(location)}"
        if problem["type"] in LIST_EXPECTED:
            return "input should be a list, as in [a, b]"
        if problem["type"] in ENTRIES_EXPECTED:
            bound, limit = ENTRIES_EXPECTED[problem["type"]]
            number = problem["ctx"][limit]
            return f"input should have at {bound} {number} {'entry' if number == 1 else 'entries'}"
        return f"{problem['msg'][0].lower()}{problem['msg'][1:]}"

    def _example(self, location: list[str]) -> str:
        """A key of a section with a value: one that must be given, else the first that has a default."""
        section = self._root
        for name in (part for part in location if not part.isdigit()):
            section = next(self._sections(section.model_fields[name].annotation))
        fields = section.model_fields
        key = min(fields, key=lambda name: (not fields[name].is_required(), fields[name].default is None))
        default = fields[key].default
        value = default if isinstance(default, str | int | float) else "…"
        return yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True).strip()

    def _keys_of(self, model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{prefix}{name}"
            for section in self._sections(field.annotation):
                yield from self._keys_of(section, f"{prefix}{name}.")

    def _sections(self, annotation: Any) -> Iterator[type[BaseModel]]:
        if annotation is AlgorithmSettings:
            yield from self._algorithm
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
            for argument in typing.get_args(annotation):
                yield from self._sections(argument)


def _location(loc: tuple[str | int, ...]) -> list[str]:
    """The keys as the user writes them: behind a list index, pydantic adds the tag of the entry's kind."""
    return [str(part) for place, part in enumerate(loc) if place == 0 or not isinstance(loc[place - 1], int)]


def _nearest(location: list[str], known: list[str]) -> str:
    """`; did you mean …?` for an unknown key, looking in its own section first, then in the whole tree."""
    *section, name = [part for part in location if not part.isdigit()]
    siblings = [key for key in known if key.split(".")[:-1] == section]
    by_name = difflib.get_close_matches(name, [key.split(".")[-1] for key in siblings], n=1, cutoff=0.5)
    if by_name:
        return f"; did you mean {'.'.join([*location[:-1], by_name[0]])}?"
    elsewhere = {key.split(".")[-1]: key for key in reversed(known)}  # the first of equal names
    near = difflib.get_close_matches(name, elsewhere, n=1)
    if near:
        return f"; did you mean {elsewhere[near[0]]}?"
    return f"; known here: {', '.join(key.split('.')[-1] for key in siblings)}" if siblings else ""
