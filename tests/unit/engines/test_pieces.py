"""The pieces of a step: which rows a forward pass takes, and what its metrics are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_dist.algorithms.base import Estimates, StepBatch
from rlhf_dist.algorithms.parts.correction import Correction
from rlhf_dist.engines.pieces import StepData, named

MASK = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)  # row 1: no valid token


def of_place(offset):
    """[B, T]: each entry tells its row and column."""
    return torch.arange(12.0).reshape(4, 3) + offset


@pytest.fixture
def data():
    batch = StepBatch(
        mask=MASK,
        rollout_logprobs=of_place(0),
        old_logprobs=of_place(100),
        rewards=torch.zeros(4),
        values=of_place(200),
        ref_logprobs=of_place(300),
        group_ids=torch.arange(4),
    )
    return StepData(
        samples=SimpleNamespace(response_lengths=np.array([3, 2, 1, 2])),
        batch=batch,
        estimates=Estimates(of_place(400), of_place(500)),
        correction=Correction(of_place(600), of_place(700), {}),
    )


def test_counts_are_of_all_ranks_and_of_samples_with_a_token(data):
    assert data.counts([[[0], [1]], [[3], []]]) == (5, 2)


def test_a_piece_has_its_rows_of_everything_and_no_width_that_none_needs(data):
    micro = data.piece([3, 2], 5, 2)
    for tensor, offset in [
        (micro.advantages, 400),
        (micro.returns, 500),
        (micro.old_values, 200),
        (micro.ref_logprobs, 300),
        (micro.old_logprobs, 600),  # as the correction says, not the learner's
        (micro.weights, 700),
    ]:
        assert (tensor - offset).tolist() == [[9, 10], [6, 7]]
    assert micro.mask.tolist() == [[True, True], [True, False]]
    assert (micro.num_tokens, micro.num_sequences) == (5, 2)


def test_what_a_step_lacks_its_pieces_lack(data):
    batch = StepBatch(**(vars(data.batch) | {"values": None, "ref_logprobs": None}))
    lacking = StepData(data.samples, batch, Estimates(of_place(0), None), Correction(of_place(0), None, {}))
    micro = lacking.piece([0], 3, 1)
    assert [micro.old_values, micro.returns, micro.weights, micro.ref_logprobs] == [None] * 4


def test_the_piece_of_an_idle_rank_is_empty(data):
    assert data.piece([], 5, 2).mask.shape == (0, 0)


def test_losses_of_pieces_weighted_by_their_tokens_give_that_of_the_minibatch(data):
    shares = {(0,): 0.7, (2, 3): 0.2}
    metrics = []
    for rows, share in shares.items():
        micro = data.piece(rows, 6, 3)
        stats = named("policy", torch.tensor(share), {"ratio_mean": torch.tensor(1.5)}, micro)
        assert stats["policy_ratio_mean"] == 1.5
        metrics.append(float(stats["policy_loss"]) * int(micro.mask.sum()))
    assert sum(metrics) / 6 == pytest.approx(0.9)
