"""GRPO: advantages and the loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.algorithms.parts.correction import CorrectionSettings, correct


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


def test_a_token_that_icepop_drops_keeps_its_kl_and_loses_its_surrogate(recipe, micro_batch):
    """One response of two tokens, r = 1, A = 3: the gradient is -w A / 2 + coef (1 - exp(-d)) / 2 at each."""
    old = torch.tensor([[-1.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    settings = CorrectionSettings(kind="icepop", cap=(0.5, 2.0))
    rollout = old - torch.tensor([[math.log(1.5), math.log(2.5)]])  # rho 1.5 is kept, 2.5 dropped
    micro = micro_batch(
        mask=mask,
        old_logprobs=old,
        advantages=torch.full((1, 2), 3.0),
        ref_logprobs=old - math.log(2.0),  # d = log 2
        weights=correct(settings, old, rollout, mask).weights,
    )
    logprobs = old.clone().requires_grad_()
    loss, _ = recipe("grpo", kl={"coef": 0.4}).policy_objective(logprobs, torch.zeros(1, 2), micro)
    loss.backward()
    of_kl = 0.4 * (1 - 0.5) / 2
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.5 * 3.0 / 2 + of_kl, of_kl]]))


def test_a_token_that_is_dropped_keeps_its_entropy_bonus(recipe, micro_batch):
    entropy = torch.ones(1, 2, requires_grad=True)
    micro = micro_batch(mask=torch.ones(1, 2, dtype=torch.bool), weights=torch.tensor([[1.5, 0.0]]))
    made = recipe("grpo", entropy_coef=0.1, kl={"coef": 0})
    made.policy_objective(torch.zeros(1, 2), entropy, micro)[0].backward()
    torch.testing.assert_close(entropy.grad, torch.tensor([[-0.05, -0.05]]))
