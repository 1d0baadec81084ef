"""Sets of prompt ordinals, and of other numbers that count up, small however long a run is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", int, str)


class Ordinals:
    """A set of numbers that is nearly all those below some mark: that mark, and the exceptions above."""

    def __init__(self, ordinals: Iterable[int] = ()) -> None:
        self._low = 0
        self._above: set[int] = set()
        for ordinal in ordinals:
            self.add(ordinal)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal < self._low or ordinal in self._above

    def add(self, ordinal: int) -> None:
        if ordinal >= self._low:
            self._above.add(ordinal)
        while self._low in self._above:
            self._above.remove(self._low)
            self._low += 1

    def without(self, others: Iterable[int]) -> Ordinals:
        """A copy that lacks some, all of them near the mark or above it."""
        lacking = set(others)
        rest = Ordinals()
        rest._low = min([self._low, *lacking])
        rest._above = self._above.union(range(rest._low, self._low)) - lacking
        return rest

    @property
    def end(self) -> int:
        """One more than the largest."""
        return max(self._above, default=self._low - 1) + 1


class OrdinalIndex(Generic[Key]):
    """Ordinals by a key, those of a key in the order in which they were added."""

    def __init__(self) -> None:
        self._ordinals: dict[Key, dict[int, None]] = {}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._ordinals)

    def of(self, key: Key) -> dict[int, None]:
        return self._ordinals.get(key, {})

    def add(self, key: Key, ordinal: int) -> None:
        self._ordinals.setdefault(key, {})[ordinal] = None

    def remove(self, key: Key, ordinal: int) -> None:
        ordinals = self._ordinals[key]
        del ordinals[ordinal]
        if not ordinals:
            del self._ordinals[key]
