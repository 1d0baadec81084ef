"""Dr. GRPO: no division by the spread of scores, none by the length of a response."""

from __future__ import annotations

import pytest
import torch


def test_scores_are_only_centered(recipe, step_batch):
    estimates, _ = recipe("dr_grpo").estimate(step_batch())
    expected = [[-2.0] * 3, [-1.0, -1.0, 0], [3.0, 0, 0], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(estimates.advantages, torch.tensor(expected))


def test_the_loss_divides_by_a_constant(recipe, micro_batch):
    loss, _ = recipe("dr_grpo", aggregation_scale=10).policy_objective(
        torch.zeros(5, 3), torch.zeros(5, 3), micro_batch()
    )
    assert float(loss) == pytest.approx(-11 / 5 / 10)


def test_a_token_counts_the_same_in_a_long_response(recipe, micro_batch):
    logprobs = torch.zeros(5, 3, requires_grad=True)
    micro = micro_batch()
    recipe("dr_grpo").policy_objective(logprobs, torch.zeros(5, 3), micro)[0].backward()
    assert logprobs.grad[micro.mask].unique().numel() == 1
