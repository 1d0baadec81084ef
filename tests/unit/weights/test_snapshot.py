"""Weight snapshots: the bytes that go in come out, and a changed one is found and named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe
from rlhf_dist.weights.snapshot import named_tensors, take_snapshot, verify

PROBE = Probe((1, 2, 3), (-0.5, -0.25))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def snapshot(**tensors):
    return take_snapshot(7, tensors.items(), PROBE)


def same_bits(one, other):
    """Equality that tells -0.0 from 0.0 and one NaN from another."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and bytes(raw(one)) == bytes(raw(other))


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator).to(dtype)
    weight[0, 0], weight[0, 1], weight[0, 2] = float("nan"), float("-inf"), -0.0
    bias = torch.arange(4).to(dtype)
    manifest, payload = snapshot(weight=weight, bias=bias)
    verify(manifest, payload)
    restored = dict(named_tensors(manifest, payload))
    assert list(restored) == ["weight", "bias"]
    assert same_bits(restored["weight"], weight)
    assert same_bits(restored["bias"], bias)


def test_the_manifest_names_version_dtype_shape_digest_and_probe():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    manifest, payload = snapshot(weight=weight)
    (entry,) = manifest.tensors
    assert (manifest.version, manifest.probe) == (7, PROBE)
    assert (entry.name, entry.dtype, entry.shape) == ("weight", "bfloat16", (2, 2))
    expected = bytes.fromhex("803f 0040 4040 8040")  # 1, 2, 3, 4 in bfloat16, little-endian
    assert bytes(payload[0]) == expected
    assert entry.digest == xxhash.xxh3_128_hexdigest(expected)


def test_a_scalar_keeps_having_no_dimension():
    manifest, payload = snapshot(scale=torch.tensor(2.5))
    ((_, restored),) = named_tensors(manifest, payload)
    assert restored.shape == ()
    assert restored.item() == 2.5


def test_a_tensor_that_is_not_contiguous_comes_back_in_its_own_order():
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": whole.T, "columns": whole[:, 1::2], "expanded": torch.ones(1, 3).expand(2, 3)}
    manifest, payload = snapshot(**views)
    verify(manifest, payload)
    for name, restored in named_tensors(manifest, payload):
        assert torch.equal(restored, views[name]), name
    assert [len(each) for each in payload] == [24 * 4, 12 * 4, 6 * 4]


def test_tied_tensors_are_there_under_both_names():
    embedding = torch.nn.Parameter(torch.randn(4, 2))
    manifest, payload = snapshot(embed=embedding, head=embedding)
    verify(manifest, payload)
    restored = dict(named_tensors(manifest, payload))
    assert same_bits(restored["embed"], embedding.detach())
    assert same_bits(restored["head"], embedding.detach())
    assert manifest.tensors[0].digest == manifest.tensors[1].digest


def test_later_updates_of_the_weights_do_not_reach_a_snapshot():
    weight = torch.nn.Parameter(torch.zeros(3))
    manifest, payload = snapshot(weight=weight)
    weight.data.fill_(9.0)
    verify(manifest, payload)
    ((_, restored),) = named_tensors(manifest, payload)
    assert restored.tolist() == [0.0, 0.0, 0.0]
    assert not restored.requires_grad


def test_tensors_are_read_from_memory_that_may_not_be_written(recwarn):
    manifest, payload = snapshot(weight=torch.tensor([1.0, 2.0]))
    payload[0].setflags(write=False)  # as the object store hands it out
    verify(manifest, payload)
    ((_, restored),) = named_tensors(manifest, payload)
    assert restored.tolist() == [1.0, 2.0]
    assert restored.data_ptr() == payload[0].ctypes.data
    assert not recwarn.list


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_of_any_one_byte_names_its_tensor(data):
    tensors = {
        name: torch.randn(data.draw(st.lists(st.integers(1, 4), max_size=3))).to(
            data.draw(st.sampled_from(DTYPES))
        )
        for name in ("a.weight", "b.weight", "c.weight")
    }
    manifest, payload = take_snapshot(3, tensors.items(), PROBE)
    victim = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(0, payload[victim].size - 1))
    payload[victim][place] ^= data.draw(st.integers(1, 255))
    name = manifest.tensors[victim].name
    with pytest.raises(
        WeightsError, match=f"^weight snapshot version 3: tensor {name} has digest "
    ) as caught:
        verify(manifest, payload)
    assert manifest.tensors[victim].digest in str(caught.value)
    assert str(caught.value).endswith("the bytes were damaged on their way")


def test_two_tensors_in_each_others_place_are_found():
    manifest, payload = snapshot(one=torch.zeros(3), two=torch.ones(3))
    with pytest.raises(WeightsError, match="tensor one has digest"):
        verify(manifest, payload[::-1])


def test_a_cut_tensor_is_found():
    manifest, payload = snapshot(one=torch.zeros(3))
    with pytest.raises(WeightsError, match="tensor one has digest"):
        verify(manifest, [payload[0][:-4]])


@pytest.mark.parametrize("count", [1, 3])
def test_a_missing_or_surplus_tensor_is_counted(count):
    manifest, payload = snapshot(one=torch.zeros(3), two=torch.ones(3))
    others = [*payload, np.zeros(4, np.uint8)][:count]
    message = f"^weight snapshot version 7 holds {count} tensors, its manifest names 2$"
    with pytest.raises(WeightsError, match=message):
        verify(manifest, others)


def test_another_versions_manifest_does_not_fit():
    old, _ = snapshot(weight=torch.zeros(3))
    _, new_payload = snapshot(weight=torch.full((3,), 1e-30))
    with pytest.raises(WeightsError, match="weight snapshot version 6: tensor weight"):
        verify(dataclasses.replace(old, version=6), new_payload)
