"""PPO by an adaptive penalty: the loss of a token by hand, and the rule of the penalty."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 1.5, 9.0])
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
def test_the_loss_of_one_token_is_the_ratio_and_a_penalty_without_a_clip(
    ratio, advantage, recipe, micro_batch
):
    made = recipe("ppo_kl", penalty_coef=0.5)
    micro = micro_batch(mask=ONE, advantages=torch.full((1, 1), advantage))
    loss, stats = made.policy_objective(torch.full((1, 1), math.log(ratio)), torch.zeros(1, 1), micro)
    assert float(loss) == pytest.approx(
        -ratio * advantage + 0.5 * (ratio - 1 - math.log(ratio)), rel=1e-5, abs=1e-6
    )
    assert float(stats["penalty_coef"]) == 0.5
    assert not any("clip" in name for name in stats)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_a_weight_multiplies_the_penalty_as_it_does_the_ratio(weight, recipe, micro_batch):
    micro = micro_batch(mask=ONE, advantages=torch.full((1, 1), 3.0), weights=torch.full((1, 1), weight))
    logprobs = torch.full((1, 1), math.log(1.5), requires_grad=True)
    loss, _ = recipe("ppo_kl", penalty_coef=2.0).surrogate(logprobs, micro)
    loss.backward()
    assert loss.item() == pytest.approx(weight * (-1.5 * 3.0 + 2.0 * (0.5 - math.log(1.5))), rel=1e-5)
    assert float(logprobs.grad) == pytest.approx(weight * (-1.5 * 3.0 + 2.0 * 0.5), rel=1e-5)


def test_the_penalty_has_the_gradient_of_the_divergence(recipe, micro_batch):
    """d/d log pi of r - 1 - log r is r - 1."""
    logprobs = torch.full((1, 1), math.log(1.5), requires_grad=True)
    micro = micro_batch(mask=ONE, advantages=torch.zeros(1, 1))
    recipe("ppo_kl", penalty_coef=2.0).surrogate(logprobs, micro)[0].backward()
    assert float(logprobs.grad) == pytest.approx(2.0 * 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("approx_kl", "beta"),
    [(0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0), (5.0, 2.0)],
)
def test_beta_is_halved_below_two_thirds_of_the_target_and_doubled_above_three_halves(
    approx_kl, beta, recipe
):
    made = recipe("ppo_kl", penalty_coef=1.0, penalty_target=0.01)
    made.after_updates(approx_kl)
    assert made.beta == beta


def test_beta_comes_back_from_either_end(recipe):
    made = recipe("ppo_kl", penalty_target=0.01)
    for _ in range(100):
        made.after_updates(0.0)
    assert made.beta == 1e-6
    for _ in range(100):
        made.after_updates(1.0)
    assert made.beta == 1e6


def test_beta_is_in_the_state(recipe):
    before, after = recipe("ppo_kl"), recipe("ppo_kl")
    before.after_updates(1.0)
    assert before.state_dict() == {"kl_controller": None, "beta": 2.0}
    after.load_state_dict(before.state_dict())
    assert after.beta == 2.0


def test_a_step_of_one_update_cannot_measure_its_divergence(recipe):
    with pytest.raises(ValidationError, match=r"num_epochs x num_minibatches must be at least 2"):
        recipe("ppo_kl", num_epochs=1)
    assert recipe("ppo_kl", num_epochs=1, num_minibatches=2).settings.num_minibatches == 2


def test_the_divergence_that_steers_beta_is_not_the_samplers_gap(recipe):
    with pytest.raises(
        ValidationError,
        match=r"name=ppo_kl steers .* penalty_target=0\.01.* set correction\.old_logprobs=learner",
    ):
        recipe("ppo_kl", correction={"old_logprobs": "rollout"})
