"""What the processes that this one has started take, read from the kernel."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    name: str
    """What `ps` shows; of a Ray actor `ray::CLASS`, of one in a call `ray::CLASS.METHOD`."""
    cpu_s: float
    """User and system time since it began."""
    rss_bytes: int
    """Resident memory, shared pages included."""


def usage_of_all(pid: int | None = None) -> dict[int, Usage]:
    """By process id: this process (or `pid`) and all that descend from it. One that ends is left out."""
    root = psutil.Process(pid or os.getpid())
    found = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                times = process.cpu_times()
                found[process.pid] = Usage(
                    " ".join(process.cmdline()), times.user + times.system, process.memory_info().rss
                )
        except psutil.NoSuchProcess:
            continue
    return found


def is_actor(usage: Usage, class_name: str) -> bool:
    """Whether a process is a Ray actor of this class."""
    first = usage.name.partition(" ")[0]
    return first == f"ray::{class_name}" or first.startswith(f"ray::{class_name}.")
