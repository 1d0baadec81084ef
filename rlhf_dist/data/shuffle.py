"""Permutations that depend on nothing but numbers: the same on every machine, process and numpy version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(count)` from `key`, for example (seed, epoch); no key number is negative.

    Sorts raw Philox words, since numpy promises a stable stream for those and not for
    `Generator.permutation`.
    """
    seed, *rest = key
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(rest))).random_raw(count)
    return np.argsort(words, kind="stable")
