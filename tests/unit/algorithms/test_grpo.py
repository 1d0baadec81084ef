"""GRPO: advantages and the loss by hand."""

from __future__ import annotations

import math

import pytest
import torch


def test_scores_are_centered_and_scaled_by_their_group(recipe, step_batch):
    estimates, metrics = recipe("grpo").estimate(step_batch())
    root = math.sqrt(7)  # (4 + 1 + 9) / 2
    first = torch.tensor([-2 / root, -1 / root, 3 / root, 0.0, 0.0])
    torch.testing.assert_close(estimates.advantages[:, 0], first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(estimates.advantages[0], first[0].expand(3), rtol=1e-5, atol=1e-6)
    assert metrics["groups_without_spread"] == 0.5
    assert estimates.returns is None


def test_without_the_deviation_scores_are_only_centered(recipe, step_batch):
    estimates, _ = recipe("grpo", normalize_std=False).estimate(step_batch())
    torch.testing.assert_close(estimates.advantages[:, 0], torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0]))


def test_the_loss_is_the_mean_over_responses_of_means_over_tokens_plus_k3(recipe, micro_batch):
    advantages = torch.tensor([[1.0, 1, 1], [2, 2, 0], [3, 0, 0], [4, 4, 0], [5, 5, 5]])
    logprobs = torch.full((5, 3), 0.1)
    micro = micro_batch(advantages=advantages, ref_logprobs=torch.zeros(5, 3))
    loss, _ = recipe("grpo").policy_objective(logprobs, logprobs, micro)
    k3 = math.exp(-0.1) - 1 + 0.1
    assert float(loss) == pytest.approx(-math.exp(0.1) * 3.0 + 0.04 * k3, rel=1e-5)


def test_a_penalty_as_a_reward_stays_out_of_the_loss(recipe, micro_batch):
    made = recipe("grpo", kl={"placement": "reward", "coef": 1.0})
    micro = micro_batch(ref_logprobs=torch.full((5, 3), 5.0))
    loss, stats = made.policy_objective(torch.zeros(5, 3), torch.zeros(5, 3), micro)
    assert float(loss) == pytest.approx(-1.0)
    assert "kl_loss" not in stats
