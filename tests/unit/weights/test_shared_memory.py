"""Publishing into shared memory: two snapshots stay, a third overwrites the first, and readers notice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe, PublishedWeights
from rlhf_dist.weights.shared_memory import SharedMemoryPublisher, SharedMemoryReceiver, attach
from rlhf_dist.weights.snapshot import snapshot_bytes

PROBE = Probe((1, 2, 3), (-0.5, -0.25))


@pytest.fixture
def publisher():
    return SharedMemoryPublisher(snapshot_bytes([40, 8]), num_threads=2)


def buckets(value):
    yield [(("embed", "head"), torch.full((2, 5), float(value)))]
    yield [(("norm",), torch.full((2,), -float(value)))]


def publish(publisher, version):
    return PublishedWeights(
        *publisher.publish(version, buckets(version), PROBE), node="here", probe_s=0, write_s=0
    )


def received(published, payload=None):
    with SharedMemoryReceiver(payload).receive(published) as tensors:
        return {name: tensor.clone() for name, tensor in tensors}


def test_every_version_arrives_whole(publisher):
    for version in range(1, 8):
        tensors = received(publish(publisher, version))
        assert tensors.keys() == {"embed", "norm", "head"}
        assert torch.equal(tensors["head"], torch.full((2, 5), float(version)))
        assert tensors["norm"].tolist() == [-version, -version]


def test_two_segments_take_turns_and_stay_mapped(publisher):
    first, second, third = (publish(publisher, version).segment for version in (1, 2, 3))
    assert first.path == third.path != second.path
    assert [each.generation for each in (first, second, third)] == [1, 2, 3]
    assert attach(first) is attach(third)


def test_the_version_before_stays_readable_until_the_one_after_the_next_is_begun(publisher):
    old = publish(publisher, 1)
    publish(publisher, 2)
    assert received(old)["norm"].tolist() == [-1, -1]

    def while_writing():
        yield [(("embed", "head"), torch.zeros(2, 5))]
        with pytest.raises(WeightsError, match=r"^weight snapshot version 1 was overwritten"):
            received(old)
        yield [(("norm",), torch.zeros(2))]

    publisher.publish(3, while_writing(), PROBE)
    with pytest.raises(WeightsError, match=r"^weight snapshot version 1 was overwritten"):
        received(old)


def test_a_reader_that_is_overtaken_is_told_when_it_has_read(publisher):
    reading = SharedMemoryReceiver().receive(publish(publisher, 1))
    reading.__enter__()
    publish(publisher, 2)
    publish(publisher, 3)
    with pytest.raises(WeightsError, match="version 1 was overwritten while it was to be read"):
        reading.__exit__(None, None, None)


def test_a_publisher_that_failed_half_way_goes_on_with_the_other_segment(publisher):
    def failing():
        yield [(("embed", "head"), torch.zeros(2, 5))]
        raise RuntimeError("no gather")

    before = publish(publisher, 1)
    with pytest.raises(RuntimeError, match="no gather"):
        publisher.publish(2, failing(), PROBE)
    assert received(before)["norm"].tolist() == [-1, -1]
    assert received(publish(publisher, 3))["norm"].tolist() == [-3, -3]


def test_without_its_publisher_a_snapshot_is_refused_by_name():
    publisher = SharedMemoryPublisher(snapshot_bytes([40, 8]), num_threads=1)
    published = publish(publisher, 5)
    gone = dataclasses.replace(published.segment, path="/proc/0/fd/0")
    with pytest.raises(WeightsError, match=r"^weight snapshot version 5 cannot be opened at /proc/0/fd/0: "):
        received(dataclasses.replace(published, segment=gone))


def test_bytes_that_are_given_are_read_in_place_of_the_segment(publisher):
    published = publish(publisher, 1)
    payload = attach(published.segment).data.copy()
    publish(publisher, 2)
    publish(publisher, 3)
    assert received(published, payload)["norm"].tolist() == [-1, -1]
    payload[0] ^= 1  # of the embedding
    with pytest.raises(WeightsError, match="tensor embed has digest"):
        received(published, payload)
