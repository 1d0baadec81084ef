"""REINFORCE: returns and the gradient by hand."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError


def test_returns_are_discounted_and_penalized_token_by_token(recipe, step_batch):
    # k1 is 1 at the first token of the first response: its reward is -0.1
    old = torch.zeros(5, 3)
    old[0, 0] = 1.0
    batch = step_batch(old_logprobs=old, ref_logprobs=torch.zeros(5, 3))
    made = recipe("reinforce", gamma=0.5, baseline="none", kl={"coef": 0.1})
    estimates, metrics = made.estimate(batch)
    expected = [[0.15, 0.5, 1.0], [1.0, 2.0, 0], [6.0, 0, 0], [2.5, 5.0, 0], [1.25, 2.5, 5.0]]
    torch.testing.assert_close(estimates.advantages, torch.tensor(expected))
    assert metrics["return_mean"] == pytest.approx(26.9 / 11)
    assert estimates.returns is None


def test_the_baseline_is_the_mean_over_the_tokens(recipe, step_batch):
    estimates, metrics = recipe("reinforce").estimate(step_batch())
    mean = (3 * 1 + 2 * 2 + 6 + 2 * 5 + 3 * 5) / 11
    expected = [[1.0] * 3, [2.0, 2.0, mean], [6.0, mean, mean], [5.0, 5.0, mean], [5.0] * 3]
    torch.testing.assert_close(estimates.advantages, torch.tensor(expected) - mean)
    assert metrics["return_mean"] == pytest.approx(mean)


def test_the_loss_is_the_advantage_times_the_log_probability(recipe, micro_batch):
    mask = torch.tensor([[True, True], [True, False]])
    micro = micro_batch(
        mask=mask,
        advantages=torch.tensor([[2.0, -1.0], [4.0, 0.0]]),
        weights=torch.tensor([[1.0, 2.0], [0.5, 1.0]]),
    )
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    loss, _ = recipe("reinforce").policy_objective(logprobs, torch.zeros(2, 2), micro)
    assert loss.item() == pytest.approx((2.0 - 4.0 + 6.0) / 3)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2.0, 2.0], [-2.0, 0.0]]) / 3)


def test_there_is_no_ratio_for_the_rollouts_log_probabilities(recipe):
    with pytest.raises(ValidationError, match=r"reinforce has no ratio .* correct with correction\.kind"):
        recipe("reinforce", correction={"old_logprobs": "rollout"})
