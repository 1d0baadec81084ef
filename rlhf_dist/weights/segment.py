"""Shared memory without a name: nothing of it can be left behind.

A segment is a memfd of the process that makes it. Others of the same node and user open it as
`/proc/PID/fd/N` and map it; the kernel frees it with the last process that has it open or mapped, however
each of them ends. It is no file of /dev/shm, so the size of that (64 MB in many containers) sets no limit.

A segment is written again and again, so that its pages are there already (the first touch of a page costs
many times the copy into it). Its first page says which of its contents, by number, it holds:

    0   16 bytes   token, random: another segment under the same path is not taken for this one
    16  int64      generation of the contents; 0 while they are being written
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from pathlib import Path

import numpy as np

from rlhf_dist.errors import ResourceError, WeightsError
from rlhf_dist.types import PublishedWeights, SegmentAddress

HEADER_BYTES = mmap.PAGESIZE
TOKEN_BYTES = 16
WRITING = 0
MB = 1e6
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class Segment:
    """The owner's side: room for `num_bytes`, all of it in memory from the start."""

    def __init__(self, num_bytes: int, purpose: str) -> None:
        """Take the memory.

        Args:
            purpose: what for, for the message.

        Raises:
            ResourceError: the node has not enough; the text says how much of what.
        """
        size = HEADER_BYTES + num_bytes
        free = free_bytes()
        if size > free:
            raise _no_room(purpose, size, free, "")
        self._fd = os.memfd_create("rlhf-dist", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, size)
            self._mapped = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self._fd)
            raise _no_room(purpose, size, free, f" ({error.strerror})") from error
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._mapped[:TOKEN_BYTES] = self._token
        self._generation = np.frombuffer(self._mapped, np.int64, 1, TOKEN_BYTES)
        self.data = np.frombuffer(self._mapped, np.uint8, num_bytes, HEADER_BYTES)

    def begin(self) -> None:
        """The contents are about to change: whoever reads them can tell."""
        self._generation[0] = WRITING

    def commit(self, generation: int) -> SegmentAddress:
        """The contents are complete; returns what others need to read them."""
        self._generation[0] = generation
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        return SegmentAddress(path, self._token.hex(), generation, len(self.data))


class MappedSegment:
    """A reader's side: the owner's memory, mapped read-only."""

    def __init__(self, address: SegmentAddress) -> None:
        """Map it.

        Raises:
            OSError: it cannot be opened from here, or is another file.
        """
        fd = os.open(address.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = HEADER_BYTES + address.num_bytes
            if os.fstat(fd).st_size != size:
                raise OSError(errno.ENODEV, "another file", address.path)
            mapped = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
        finally:
            os.close(fd)
        if mapped[:TOKEN_BYTES].hex() != address.token:
            raise OSError(errno.ENODEV, "another segment", address.path)
        self._generation = np.frombuffer(mapped, np.int64, 1, TOKEN_BYTES)
        self.data = np.frombuffer(mapped, np.uint8, address.num_bytes, HEADER_BYTES)

    def check(self, published: PublishedWeights) -> None:
        """Make sure that this snapshot is in it, complete.

        Raises:
            WeightsError: it has been overwritten.
        """
        if int(self._generation[0]) != published.segment.generation:
            raise WeightsError(
                f"weight snapshot version {published.manifest.version} was overwritten while it was to be "
                "read: the learner has begun a later one in the same memory; this worker is too slow, or was "
                "told too late"
            )


def free_bytes() -> int:
    """Memory that a process can still take on this node, or in this container where that allows less."""
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such limit: `max`, or no cgroup v2
        limit = int((CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, limit - used)
    return free


def _no_room(purpose: str, size: int, free: int, reason: str) -> ResourceError:
    return ResourceError(
        f"{purpose} needs {size / MB:,.0f} MB of shared memory, and this node has {free / MB:,.0f} MB of "
        f"memory left{reason}; give the node more, or run fewer workers on it"
    )
