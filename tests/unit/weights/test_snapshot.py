"""Weight snapshots: the bytes that go in come out, and a changed one is found and named."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe, WeightManifest
from rlhf_dist.weights.snapshot import CHUNK_BYTES, SnapshotWriter, named_tensors, snapshot_bytes, verify

PROBE = Probe((1, 2, 3), (-0.5, -0.25))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
TENSORS = st.builds(
    lambda shape, dtype, seed: torch.randint(
        256, tuple(shape), generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)


def take(*buckets, version=7):
    """A snapshot of buckets of (names, tensor), and its bytes."""
    size = snapshot_bytes(tensor.nbytes for bucket in buckets for _, tensor in bucket)
    target = np.full(size, 0xEE, np.uint8)
    with ThreadPoolExecutor(2) as threads:
        writer = SnapshotWriter(target, threads)
        for bucket in buckets:
            writer.add(bucket)
        entries = writer.finish()
    return WeightManifest(version, entries, PROBE), target


def snapshot(**tensors):
    return take([((name,), tensor) for name, tensor in tensors.items()])


def same_bits(one, other):
    """Equality that tells -0.0 from 0.0 and one NaN from another."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and bytes(raw(one)) == bytes(raw(other))


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
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
    assert bytes(payload[entry.offset :][:8]) == expected
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
    assert [entry.offset for entry in manifest.tensors] == [0, 128, 192]  # 96, 48 and 24 bytes
    assert len(payload) == 256


def test_tied_tensors_travel_once_and_are_there_under_both_names():
    embedding, norm = torch.randn(4, 2), torch.ones(3)
    manifest, payload = take([(("embed", "head"), embedding), (("norm",), norm)])
    verify(manifest, payload)
    restored = dict(named_tensors(manifest, payload))
    assert list(restored) == ["embed", "norm", "head"]
    assert same_bits(restored["embed"], embedding)
    assert restored["head"].data_ptr() == restored["embed"].data_ptr()
    assert len(payload) == 128


def test_a_tensor_of_many_chunks_comes_back_with_one_digest():
    long = torch.arange(3 * CHUNK_BYTES // 4 + 5, dtype=torch.float32)
    manifest, payload = snapshot(long=long)
    verify(manifest, payload)
    ((_, restored),) = named_tensors(manifest, payload)
    assert torch.equal(restored, long)
    assert manifest.tensors[0].digest == xxhash.xxh3_128_hexdigest(long.numpy().tobytes())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(TENSORS, max_size=3), max_size=4), st.data())
def test_whatever_goes_in_comes_out(buckets, data):
    """Any dtypes, any shapes, empty tensors and buckets, any number of names each."""
    expected, named = {}, []
    for bucket in buckets:
        named.append([])
        for tensor in bucket:
            names = tuple(f"t{len(expected)}.{k}" for k in range(data.draw(st.integers(1, 3))))
            named[-1].append((names, tensor))
            expected |= dict.fromkeys(names, tensor)
    manifest, payload = take(*named)
    verify(manifest, payload)
    restored = dict(named_tensors(manifest, payload))
    assert restored.keys() == expected.keys()
    for name, tensor in restored.items():
        assert same_bits(tensor, expected[name]), name


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
    payload.setflags(write=False)  # as shared memory and the object store hand it out
    verify(manifest, payload)
    ((_, restored),) = named_tensors(manifest, payload)
    assert restored.tolist() == [1.0, 2.0]
    assert restored.data_ptr() == payload.ctypes.data
    assert not recwarn.list


@settings(max_examples=60, deadline=None)
@given(st.lists(TENSORS.filter(torch.numel), min_size=1, max_size=4), st.data())
def test_damage_of_any_one_byte_names_its_tensor(tensors, data):
    manifest, payload = take([((f"{i}.weight",), tensor) for i, tensor in enumerate(tensors)], version=3)
    victim = manifest.tensors[data.draw(st.integers(0, len(tensors) - 1))]
    size = tensors[manifest.tensors.index(victim)].nbytes
    payload[victim.offset + data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(
        WeightsError, match=f"^weight snapshot version 3: tensor {victim.name} has digest "
    ) as caught:
        verify(manifest, payload)
    assert victim.digest in str(caught.value)
    assert str(caught.value).endswith("the bytes were damaged on their way")


def test_two_tensors_in_each_others_place_are_found():
    manifest, payload = snapshot(one=torch.zeros(16), two=torch.ones(16))
    with pytest.raises(WeightsError, match="tensor one has digest"):
        verify(manifest, np.roll(payload, 64))


def test_bytes_that_were_cut_are_found():
    manifest, payload = snapshot(one=torch.zeros(16))
    with pytest.raises(WeightsError, match="tensor one has digest"):
        verify(manifest, payload[:-4])


def test_another_versions_manifest_does_not_fit():
    old, _ = snapshot(weight=torch.zeros(3))
    _, new_payload = snapshot(weight=torch.full((3,), 1e-30))
    with pytest.raises(WeightsError, match="weight snapshot version 6: tensor weight"):
        verify(dataclasses.replace(old, version=6), new_payload)
