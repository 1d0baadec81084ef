"""Packed and padded batches: literal layouts, and that both say the same of the same sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.experience.sequences import PackedBatch, PaddedBatch, sequence_batch

PROMPTS = [np.array([10, 11, 12]), np.array([20]), np.array([30, 31])]
RESPONSES = [np.array([13, 14]), np.array([21, 22, 23]), np.array([], dtype=np.int32)]


def test_a_pack_is_one_row_with_positions_of_its_own_for_each_sequence():
    batch = PackedBatch.build(PROMPTS, RESPONSES)
    assert batch.inputs()["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23, 30, 31]]
    assert batch.inputs()["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    assert batch.inputs()["sequence_lengths"] == (5, 4, 2)
    assert batch.kept.tolist() == [2, 3, 5, 6, 7]
    assert batch.labels.tolist() == [[13, 14, 21, 22, 23]]


def test_a_padded_batch_is_a_rectangle():
    batch = PaddedBatch.build(PROMPTS, RESPONSES)
    assert batch.inputs()["input_ids"].tolist() == [
        [10, 11, 12, 13, 14],
        [20, 21, 22, 23, 0],
        [30, 31, 0, 0, 0],
    ]
    assert batch.inputs()["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.kept.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("packed", [True, False])
def test_the_columns_before_response_tokens_predict_them(packed):
    batch = sequence_batch(PROMPTS, RESPONSES, packed=packed)
    assert batch.responses(batch.labels).tolist() == [[13, 14, 0], [21, 22, 23], [0, 0, 0]]
    assert batch.last(batch.inputs()["input_ids"]).tolist() == [14, 23, 31]


@pytest.mark.parametrize("packed", [True, False])
def test_no_samples_are_one_sequence_that_counts_for_nothing(packed):
    batch = sequence_batch([], [], packed=packed)
    assert batch.inputs()["input_ids"].shape == (1, 2)
    assert batch.responses(batch.labels).shape == (1, 0)


@pytest.mark.parametrize("packed", [True, False])
def test_prompts_and_responses_must_be_of_one_number(packed):
    with pytest.raises(ValueError, match="zip"):
        sequence_batch([np.array([1])], [], packed=packed)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=6))
def test_packed_and_padded_agree(lengths):
    tokens = iter(range(1, 1000))
    prompts, responses = (
        [np.array([next(tokens) for _ in range(pair[side])], dtype=np.int32) for pair in lengths]
        for side in (0, 1)
    )
    packed, padded = (sequence_batch(prompts, responses, packed=packed) for packed in (True, False))
    moved = packed.to(torch.device("cpu")), padded.to(torch.device("cpu"))
    for one, other in ((packed, padded), moved):
        assert torch.equal(one.responses(one.labels), other.responses(other.labels))
        assert torch.equal(one.last(one.inputs()["input_ids"]), other.last(other.inputs()["input_ids"]))
    assert packed.inputs()["input_ids"].numel() == sum(map(sum, lengths))
