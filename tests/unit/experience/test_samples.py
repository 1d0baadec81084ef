"""The learner's view of a batch: one order whoever was fast, flat arrays, and rectangles cut from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.errors import RunError
from rlhf_dist.experience.samples import Samples
from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA
from rlhf_dist.types import VersionSpan

PER_TOKEN = ("response_tokens", "response_mask", "rollout_logprobs", "ref_logprobs")
PER_SAMPLE = ("prompt_lengths", "response_lengths", "oldest_versions", "rewards", "ordinals", "finished")


def lists(samples, name):
    """The numbers of each sample, in the order of the samples."""
    starts, lengths = (
        (samples.prompt_starts, samples.prompt_lengths)
        if name == "prompt_tokens"
        else (samples.response_starts, samples.response_lengths)
    )
    values = getattr(samples, name)
    return [values[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


def assert_equal(one, other):
    for name in ("prompt_tokens", *PER_TOKEN):
        assert lists(one, name) == lists(other, name), name
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    for name in PER_SAMPLE:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    assert one.reward_parts.keys() == other.reward_parts.keys()
    for name, part in one.reward_parts.items():
        np.testing.assert_array_equal(part, other.reward_parts[name])


@pytest.fixture(scope="module")
def three(completion, scored):
    """Samples (1,0), (1,1), (2,0) with prompts of 2, 2, 3 and responses of 3, 0, 2 tokens, in two batches."""
    late = scored([completion(2, prompt_length=3, length=2, version=4)])
    early = scored([completion(1, 1, length=0), completion(1, length=3, version=3, finish_reason="length")])
    return Samples.from_batches([late, early])


def test_samples_are_in_the_order_of_ordinal_and_sample(three):
    assert three.num_samples == 3
    assert three.num_response_tokens == 5
    assert three.ordinals.tolist() == [1, 1, 2]
    assert lists(three, "prompt_tokens") == [[1050, 1051], [1150, 1151], [2050, 2051, 2052]]
    assert lists(three, "response_tokens") == [[1000, 1001, 1002], [], [2000, 2001]]
    assert lists(three, "response_mask") == [[1, 1, 1], [], [1, 1]]
    for name, factor in (("rollout_logprobs", 1), ("ref_logprobs", 1 / 2)):
        expected = [[-1000, -1001, -1002], [], [-2000, -2001]]
        assert lists(three, name) == [[factor * each / 4096 for each in row] for row in expected]
    assert three.oldest_versions.tolist() == [3, 0, 4]
    assert three.rewards.tolist() == [1.0, 1.1, 2.0]
    assert three.finished.tolist() == [False, True, True]
    assert {name: part.tolist() for name, part in three.reward_parts.items()} == {
        "help": [1.0, 1.0, 2.0],
        "tone": [0.0, 1.0, 0.0],
    }


def test_the_oldest_version_is_that_of_the_oldest_token(completion, scored):
    spans = (VersionSpan(2, 0, 2), VersionSpan(3, 2, 5))
    mixed = replace(completion(1, length=5), version_spans=spans)
    batch = scored([completion(9), mixed, completion(0, length=1, version=7)])
    assert Samples.from_batches([batch.slice(1)]).oldest_versions.tolist() == [7, 2]


def test_the_arrays_have_the_documented_types(three):
    arrays = {name: value for name, value in vars(three).items() if isinstance(value, np.ndarray)}
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "prompt_tokens": "int32",
        "prompt_starts": "int64",
        "prompt_lengths": "int64",
        "response_tokens": "int32",
        "response_starts": "int64",
        "response_lengths": "int64",
        "response_mask": "uint8",
        "rollout_logprobs": "float32",
        "ref_logprobs": "float32",
        "oldest_versions": "int32",
        "rewards": "float64",
        "ordinals": "int64",
        "finished": "bool",
    }


def test_without_a_reference_there_are_no_reference_log_probabilities(completion, scored):
    assert Samples.from_batches([scored([completion(1)], reference=False)]).ref_logprobs is None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_order_does_not_depend_on_arrival(data, completion, scored):
    lengths = data.draw(
        st.dictionaries(
            st.tuples(st.integers(0, 9), st.integers(0, 2)),
            st.tuples(st.integers(1, 3), st.integers(0, 4)),
            min_size=1,
            max_size=8,
        )
    )
    completions = [
        completion(ordinal, sample, prompt_length=prompt_length, length=length)
        for (ordinal, sample), (prompt_length, length) in lengths.items()
    ]
    arrived = data.draw(st.permutations(completions))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(arrived) - 1)))) | {0, len(arrived)})
    batches = [scored(arrived[start:end]) for start, end in pairwise(cuts)]

    expected = [(ordinal, sample) for ordinal, sample in sorted(lengths)]
    samples = Samples.from_batches(data.draw(st.permutations(batches)))
    assert samples.ordinals.tolist() == [ordinal for ordinal, _ in expected]
    assert samples.rewards.tolist() == [ordinal + sample / 10 for ordinal, sample in expected]
    assert samples.response_lengths.tolist() == [lengths[key][1] for key in expected]
    assert samples.total_lengths == [sum(lengths[key]) for key in expected]
    tokens = [[1000 * o + 100 * s + place for place in range(lengths[o, s][1])] for o, s in expected]
    assert lists(samples, "response_tokens") == tokens
    assert_equal(samples, Samples.from_batches([scored(sorted(completions, key=lambda c: c.tokens))]))


@pytest.mark.parametrize(("start", "length"), [(0, 2), (1, 3), (4, 1), (2, 3)])
def test_a_slice_of_a_batch_reads_its_own_rows(start, length, completion, scored):
    completions = [completion(i, prompt_length=1 + i % 3, length=i) for i in range(5)]
    whole = scored(completions)
    sliced = Samples.from_batches([whole.slice(start, length)])
    assert_equal(sliced, Samples.from_batches([scored(completions[start : start + length])]))
    assert sliced.ordinals.tolist() == list(range(start, start + length))


def test_a_batch_cannot_be_changed_through_the_arrays(completion, scored):
    completions = [completion(i, length=i + 1) for i in (3, 4, 1, 2)]
    batch = scored(completions)
    samples = Samples.from_batches([batch])
    for name in ("prompt_tokens", *PER_TOKEN):
        with pytest.raises(ValueError, match="read-only"):
            getattr(samples, name)[:] = 0
    for name in PER_SAMPLE:
        getattr(samples, name)[:] = 0
    assert batch.equals(scored(completions))


def test_slices_together_are_the_whole(completion, scored):
    whole = scored([completion(i, length=i) for i in range(5)])
    assert_equal(Samples.from_batches([whole.slice(3), whole.slice(0, 3)]), Samples.from_batches([whole]))


def test_batches_that_crossed_a_process_read_the_same(completion, scored):
    batch = scored([completion(i, length=i) for i in range(4)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch.slice(1))
    received = pa.ipc.open_stream(sink.getvalue()).read_next_batch()
    assert_equal(Samples.from_batches([received]), Samples.from_batches([batch.slice(1)]))


def test_experience_of_another_version_is_refused(completion, scored):
    batch = scored([completion(1)])
    foreign = pa.RecordBatch.from_arrays(batch.columns, schema=EXPERIENCE_SCHEMA.with_metadata({}))
    with pytest.raises(RunError, match="schema version none"):
        Samples.from_batches([batch, foreign])


# ------------------------------------------------------------------------------------------ rectangles


def test_lengths_are_of_the_response_and_of_the_whole_sequence(three):
    assert three.response_lengths.tolist() == [3, 0, 2]
    assert three.total_lengths == [5, 2, 5]


def flat_of(samples, by_sample):
    """A per-token array with the numbers of each sample at their places."""
    flat = np.full(samples.num_response_tokens, -1.0)
    for start, numbers in zip(samples.response_starts, by_sample, strict=True):
        flat[start : start + len(numbers)] = numbers
    return flat


def test_padding_puts_zeros_behind_each_response(three):
    padded = three.padded(flat_of(three, [[1.0, 2.0, 3.0], [], [4.0, 5.0]]))
    assert padded.tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 0]]
    assert three.padded(three.response_mask).tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]


def test_padding_leaves_what_it_reads_alone_and_does_not_warn(three, recwarn):
    padded = three.padded(three.response_mask)
    padded.zero_()
    assert three.response_mask.tolist() == [1] * 5
    assert not recwarn.list


def test_scattering_writes_each_row_to_its_sample(three):
    flat = torch.full((5,), -1.0)
    three.scatter(torch.tensor([[4.0, 5.0, 99.0], [1.0, 2.0, 3.0]]), [2, 0], into=flat)
    assert flat.tolist() == flat_of(three, [[1.0, 2.0, 3.0], [], [4.0, 5.0]]).tolist()


def test_scattering_leaves_other_samples_alone(three):
    flat = torch.zeros(5)
    three.scatter(torch.tensor([[7.0, 8.0]]), [2], into=flat)
    expected = flat_of(three, [[0.0, 0.0, 0.0], [], [7.0, 8.0]]).tolist()
    assert flat.tolist() == expected
    three.scatter(torch.tensor([[9.0]]), [], into=flat)  # the idle row of a rank without work
    assert flat.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scattering_pieces_of_the_padded_array_gives_the_flat_one_back(data, completion, scored):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    samples = Samples.from_batches([scored([completion(i, length=n) for i, n in enumerate(lengths)])])
    flat = torch.arange(1.0, sum(lengths) + 1)
    padded = samples.padded(flat)
    assert padded.shape == (len(lengths), max(lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, len(order)))
    restored = torch.zeros_like(flat)
    for indices in (order[:cut], order[cut:]):
        samples.scatter(padded[indices], indices, into=restored)
    assert torch.equal(restored, flat)


def test_sequences_are_the_chosen_samples_in_the_order_asked_for(three):
    assert three.sequences([2, 1], packed=True).tokens.tolist() == [
        [2050, 2051, 2052, 2000, 2001, 1150, 1151]
    ]
    assert three.sequences([2, 1], packed=False).tokens.tolist() == [
        [2050, 2051, 2052, 2000, 2001],
        [1150, 1151, 0, 0, 0],
    ]
