"""Importing engines: seconds in which somebody waits, or a worker that was lost is missing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports. They make hundreds of thousands of objects that stay: looking for garbage among them again
    and again is a quarter of what importing vLLM takes. No later collection looks at them either."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
