"""GSPO: one ratio a response, by hand."""

from __future__ import annotations

import math

import pytest
import torch


def test_advantages_are_those_of_grpo(recipe, step_batch):
    batch = step_batch()
    one, other = recipe("gspo").estimate(batch)[0], recipe("grpo").estimate(batch)[0]
    torch.testing.assert_close(one.advantages, other.advantages)


def test_the_ratio_is_the_geometric_mean_of_the_response(recipe, micro_batch):
    mask = torch.tensor([[True, True, True], [True, True, False]])
    micro = micro_batch(mask=mask, advantages=torch.tensor([[1.0] * 3, [-2.0] * 3]))
    logprobs = torch.tensor([[0.3, 0.0, -0.9], [0.1, 0.3, 50.0]])  # means -0.2 and 0.2
    loss, _ = recipe("gspo", clip_low=0.5, clip_high=0.5).policy_objective(logprobs, logprobs, micro)
    assert float(loss) == pytest.approx((-math.exp(-0.2) + 2 * math.exp(0.2)) / 2, rel=1e-5)


def test_a_response_is_clipped_as_a_whole(recipe, micro_batch):
    logprobs = torch.tensor([[0.01, 0.0, -0.004]], requires_grad=True)  # mean 0.002, above 4e-4
    micro = micro_batch(mask=torch.ones(1, 3, dtype=torch.bool))
    loss, stats = recipe("gspo").policy_objective(logprobs, torch.zeros(1, 3), micro)
    loss.backward()
    assert loss.item() == pytest.approx(-1.0004, rel=1e-6)
    assert float(stats["clip_fraction"]) == 1.0
    assert (logprobs.grad == 0).all()
