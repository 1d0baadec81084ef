"""Snapshots in device memory: written, digested, cut and checked. The CPU stands for the device; mapping and
sending need a GPU (tests/gpu)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe, TensorEntry, WeightManifest
from rlhf_dist.weights import device_digest
from rlhf_dist.weights.device_digest import hex_digests, word_sums
from rlhf_dist.weights.device_memory import DevicePublisher, pieces, verify_on_device
from rlhf_dist.weights.snapshot import distinct, num_bytes_of, snapshot_bytes, tensor_views

PROBE = Probe((1, 2), (-0.5,))
CPU = torch.device("cpu")


def digest(tensor):
    return hex_digests([word_sums(tensor)])[0]


def reference(data: bytes) -> str:
    """The digest in Python's own integers."""
    golden, factors, two64 = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), 2**64

    def signed(value):
        return value - two64 if value >= two64 // 2 else value

    words = [data[begin : begin + 4].ljust(4, b"\0") for begin in range(0, len(data), 4)]
    sums = [len(data), len(data)]
    for index, word in enumerate(words):
        mixed = signed(index * golden % two64)
        mixed = (mixed ^ mixed >> 31) % two64
        for which, factor in enumerate(factors):
            sums[which] += int.from_bytes(word, "little", signed=True) * (mixed * factor % two64 | 1)
    return "".join(f"{each % two64:016x}" for each in sums)


@given(st.binary(max_size=70))
def test_a_digest_is_the_two_sums_that_it_is_said_to_be(data):
    assert digest(torch.tensor(list(data), dtype=torch.uint8)) == reference(data)


def test_a_digest_does_not_depend_on_how_it_is_cut(monkeypatch):
    tensor = torch.arange(1000, dtype=torch.float32)
    whole = digest(tensor)
    monkeypatch.setattr(device_digest, "CHUNK_WORDS", 7)
    assert digest(tensor) == whole


@given(st.binary(min_size=1, max_size=70), st.data())
def test_every_changed_bit_shows(data, draw):
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    assert digest(torch.tensor(list(data), dtype=torch.uint8)) != digest(
        torch.tensor(list(changed), dtype=torch.uint8)
    )


def test_swapped_words_and_another_length_show():
    tensor = torch.arange(64, dtype=torch.int32)
    swapped = tensor.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert len({digest(tensor), digest(swapped), digest(tensor[:-1]), digest(torch.zeros(0))}) == 4
    assert digest(torch.zeros(5)) != digest(torch.zeros(6))


@pytest.fixture
def model():
    """Names and tensors: a tied one, an empty one, odd sizes, several dtypes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (("embed", "head"), torch.randn(7, 5, generator=generator)),
        (("empty",), torch.zeros(0, 3)),
        (("norm",), torch.randn(3, generator=generator).bfloat16()),
        (("mask",), torch.tensor([1, 0, 1], dtype=torch.uint8)),
        (("wide",), torch.randn(64, 9, generator=generator).T),
    ]


@pytest.fixture
def publisher(model):
    return DevicePublisher(snapshot_bytes(each.nbytes for _, each in model), CPU)


def test_what_is_published_can_be_read_under_every_name(publisher, model):
    manifest, address = publisher.publish(3, [model[:2], model[2:]], PROBE)
    assert (manifest.version, address.generation, address.gpu, address.handle) == (3, 1, "", ())
    contents = publisher.contents(address.generation)
    verify_on_device(manifest, distinct(manifest.tensors), contents)
    found = dict(tensor_views(manifest.tensors, contents))
    assert sorted(found) == ["embed", "empty", "head", "mask", "norm", "wide"]
    for names, tensor in model:
        for name in names:
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_a_snapshot_stays_until_the_one_after_the_next_is_written(publisher, model):
    first = publisher.publish(0, [model], PROBE)[1]
    second = publisher.publish(1, [model], PROBE)[1]
    publisher.contents(first.generation)
    publisher.publish(2, [model], PROBE)
    publisher.contents(second.generation)
    with pytest.raises(WeightsError, match="overwritten while it was to be read"):
        publisher.contents(first.generation)


def test_a_snapshot_that_was_begun_and_not_finished_is_none(publisher, model):
    def broken():
        yield model
        raise RuntimeError("a rank died")

    first = publisher.publish(0, [model], PROBE)[1]
    publisher.publish(1, [model], PROBE)
    with pytest.raises(RuntimeError, match="a rank died"):
        publisher.publish(2, broken(), PROBE)
    with pytest.raises(WeightsError, match="overwritten"):
        publisher.contents(first.generation)


def test_a_damaged_tensor_is_named_with_both_digests(publisher, model):
    manifest, address = publisher.publish(5, [model], PROBE)
    contents = publisher.contents(address.generation)
    (norm,) = (each for each in manifest.tensors if each.name == "norm")
    contents[norm.offset] ^= 4
    with pytest.raises(WeightsError) as caught:
        verify_on_device(manifest, distinct(manifest.tensors), contents)
    text = str(caught.value)
    assert "version 5: tensor norm has digest " in text
    assert f"the learner published {norm.digest}" in text
    assert digest(contents[norm.offset : norm.offset + 6].view(torch.bfloat16)) in text


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(1, 400))
def test_pieces_hold_every_tensor_once_and_whole(sizes, limit):
    tensors = [((f"t{index}",), torch.zeros(size, dtype=torch.uint8)) for index, size in enumerate(sizes)]
    total = snapshot_bytes(sizes)
    manifest, _ = DevicePublisher(total, CPU).publish(0, [tensors], PROBE)
    cut = list(pieces(manifest, limit))
    assert sorted(entry.name for _, _, inside in cut for entry in inside) == sorted(
        name for names, _ in tensors for name in names
    )
    before = 0
    for begin, end, inside in cut:
        assert begin >= before
        before = end
        assert all(begin <= each.offset and each.offset + num_bytes_of(each) <= end for each in inside)
        assert end - begin <= limit or len([each for each in inside if num_bytes_of(each)]) == 1


def test_tied_names_come_in_one_piece():
    entry = {"dtype": "float32", "digest": ""}
    manifest = WeightManifest(
        0,
        (
            TensorEntry("embed", shape=(64,), offset=0, **entry),
            TensorEntry("norm", shape=(4,), offset=256, **entry),
            TensorEntry("head", shape=(64,), offset=0, **entry),
        ),
        PROBE,
    )
    cut = [(begin, end, [each.name for each in inside]) for begin, end, inside in pieces(manifest, 256)]
    assert cut == [(0, 256, ["embed", "head"]), (256, 272, ["norm"])]
