"""Runs `rlhf-dist` and reports everything that the driver process takes out of Ray, by type and size.

Usage: driver_spy.py REPORT.json train …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from ray._private.serialization import SerializationContext

PAYLOADS = (torch.Tensor, np.ndarray, pa.RecordBatch, pa.Table, pa.Array, memoryview, bytes)


def spy(report: Path) -> None:
    """Record each deserialization in this process, then let it go on."""
    seen: list[dict[str, object]] = []
    original = SerializationContext.deserialize_objects

    def recorded(self, serialized, *rest):
        values = original(self, serialized, *rest)
        for entry, value in zip(serialized, values, strict=True):
            num_bytes = sum(len(part) for part in entry[:2] if part is not None)
            seen.append({"bytes": num_bytes, "payloads": sorted(payloads_in(value))})
            report.write_text(json.dumps(seen))
        return values

    SerializationContext.deserialize_objects = recorded


def payloads_in(value: object) -> set[str]:
    """Names of the payload types anywhere inside a value."""
    if isinstance(value, PAYLOADS):
        return {type(value).__name__}
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    else:
        parts = []
    return set().union(*(payloads_in(part) for part in parts)) if parts else set()


if __name__ == "__main__":
    spy(Path(sys.argv[1]))
    del sys.argv[1]
    from rlhf_dist.cli import main

    main()
