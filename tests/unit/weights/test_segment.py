"""Shared memory without a name: who can read it, what a reader notices, and that nothing of it is left."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_dist.errors import ResourceError, WeightsError
from rlhf_dist.types import Probe, PublishedWeights, WeightManifest
from rlhf_dist.weights import segment as segment_module
from rlhf_dist.weights.segment import HEADER_BYTES, MappedSegment, Segment, free_bytes

OWNER = """
import pickle, sys
from rlhf_dist.weights.segment import Segment
segment = Segment(1000, "a test")
segment.data[:] = 7
sys.stdout.buffer.write(pickle.dumps(segment.commit(1)))
sys.stdout.flush()
print("/dev/shm" in open("/proc/self/maps").read(), file=sys.stderr, flush=True)
sys.stdin.read()
"""

LIMITED = """
import resource
from rlhf_dist.weights.segment import Segment
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
Segment(1_000_000, "a weight snapshot")
"""


def test_readers_see_what_the_owner_writes_and_cannot_write_themselves():
    segment = Segment(10, "a test")
    segment.data[:] = range(10)
    mapped = MappedSegment(segment.commit(1))
    assert mapped.data.tolist() == list(range(10))
    segment.data[3] = 77
    assert mapped.data[3] == 77, "the same memory, no copy"
    with pytest.raises(ValueError, match="read-only"):
        mapped.data[0] = 1


def published(address):
    return PublishedWeights(WeightManifest(7, (), Probe((), ())), address, "here", probe_s=0, write_s=0)


def test_a_reader_can_tell_complete_contents_from_others():
    segment = Segment(10, "a test")
    fourth = published(segment.commit(4))
    mapped = MappedSegment(fourth.segment)
    mapped.check(fourth)
    segment.begin()
    with pytest.raises(WeightsError, match="weight snapshot version 7 was overwritten"):
        mapped.check(fourth)
    sixth = published(segment.commit(6))
    mapped.check(sixth)
    with pytest.raises(WeightsError, match="weight snapshot version 7 was overwritten"):
        mapped.check(fourth)


def test_an_empty_segment_is_allowed():
    segment = Segment(0, "a test")
    assert MappedSegment(segment.commit(1)).data.size == 0


def test_another_file_or_segment_under_the_same_path_is_refused(tmp_path):
    one, two = (Segment(10, "a test").commit(1) for _ in range(2))
    with pytest.raises(OSError, match="No such file"):
        MappedSegment(dataclasses.replace(one, path=f"/proc/{os.getpid()}/fd/99999"))
    living = Segment(10, "a test")
    address = living.commit(1)
    with pytest.raises(OSError, match="another segment"):
        MappedSegment(dataclasses.replace(address, token=two.token))
    with pytest.raises(OSError, match="another file"):
        MappedSegment(dataclasses.replace(address, num_bytes=11))
    other = tmp_path / "other"
    other.write_bytes(bytes(HEADER_BYTES + 10))
    with pytest.raises(OSError, match="another segment"):
        MappedSegment(dataclasses.replace(address, path=str(other)))


def test_more_than_the_node_has_is_refused_with_both_numbers():
    with pytest.raises(ResourceError) as error:
        Segment(10**15, "a weight snapshot")
    assert str(error.value).startswith("a weight snapshot needs 1,000,000,000 MB of shared memory, and this")
    assert "MB of memory left; give the node more" in str(error.value)


def test_memory_that_the_system_refuses_is_a_message_with_its_reason():
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert "ResourceError: a weight snapshot needs 1 MB of shared memory" in run.stderr
    assert "(File too large); give the node more" in run.stderr


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(segment_module, "MEMINFO", meminfo)
    monkeypatch.setattr(segment_module, "CGROUP", tmp_path)
    assert free_bytes() == 1_024_000, "there is no limit"
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() == 1_024_000
    (tmp_path / "memory.max").write_text("600000\n")
    (tmp_path / "memory.current").write_text("250000\n")
    (tmp_path / "memory.stat").write_text("anon 90000\ninactive_file 50000\n")
    assert free_bytes() == 400_000, "cached files can be dropped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_killed_owner_but_what_readers_map(number):
    shared_before = set(Path("/dev/shm").iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as owner:
        assert owner.stderr.readline() == b"False\n", "no file of /dev/shm is in use"
        address = pickle.load(owner.stdout)
        mapped = MappedSegment(address)
        owner.send_signal(number)
        owner.wait(timeout=30)
    assert np.array_equal(mapped.data, np.full(1000, 7, np.uint8)), "a reader may finish"
    with pytest.raises(OSError, match="No such file"):
        MappedSegment(address)
    left = {path.name for path in set(Path("/dev/shm").iterdir()) - shared_before}
    assert not [name for name in left if "rlhf" in name]
