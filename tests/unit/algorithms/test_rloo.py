"""REINFORCE leave-one-out: advantages and the loss by hand."""

from __future__ import annotations

import pytest
import torch


def test_each_score_is_held_against_the_mean_of_the_others(recipe, step_batch):
    estimates, metrics = recipe("rloo").estimate(step_batch())
    expected = [[-3.0] * 3, [-1.5, -1.5, 0], [4.5, 0, 0], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(estimates.advantages, torch.tensor(expected))
    assert metrics["groups_without_spread"] == 0.5


def test_the_divergence_of_the_whole_response_comes_off_its_score(recipe, step_batch):
    old = torch.tensor([[1.0, 1, 0], [0, 0, 99], [2, 99, 99], [1, 1, 99], [2, 0, 0]])  # sums 2, 0, 2, 2, 2
    batch = step_batch(old_logprobs=old, ref_logprobs=torch.zeros(5, 3))
    estimates, metrics = recipe("rloo", kl={"coef": 0.5}).estimate(batch)
    # scores 0, 2, 5 and 4, 4
    torch.testing.assert_close(estimates.advantages[:, 0], torch.tensor([-3.5, -0.5, 4.0, 0.0, 0.0]))
    assert metrics["kl_coef"] == 0.5


def test_a_divergence_in_the_loss_leaves_the_scores_alone(recipe, step_batch):
    batch = step_batch(old_logprobs=torch.ones(5, 3), ref_logprobs=torch.zeros(5, 3))
    made = recipe("rloo", kl={"coef": 0.5, "placement": "loss", "estimator": "k3"})
    torch.testing.assert_close(
        made.estimate(batch)[0].advantages[:, 0], torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0])
    )


def test_the_loss_sums_the_tokens_of_a_response(recipe, micro_batch):
    loss, _ = recipe("rloo", kl={"coef": 0}).policy_objective(
        torch.zeros(5, 3), torch.zeros(5, 3), micro_batch()
    )
    assert float(loss) == pytest.approx(-11 / 5)
