"""PPO: the estimates of a batch worked out by hand, and objectives that may be computed in pieces."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_dist.algorithms import algorithm_names, make_algorithm, settings_class
from rlhf_dist.algorithms.base import MicroBatch, Needs, StepBatch
from rlhf_dist.algorithms.ppo import Recipe, Settings
from rlhf_dist.errors import ConfigError

# gamma 0.5, lambda 0.5, KL coefficient 0.1. Padding holds numbers that would show if they counted.
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]])
REF_LOGPROBS = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -2.0, 5.0]])
VALUES = torch.tensor([[0.5, 0.25, 0.0], [-0.5, 0.0, 7.0]])
SCORES = torch.tensor([1.0, -1.0])
# k1            [0.5, 0, -1]                [0, 1]
# rewards       [-0.05, 0, 1.1]             [0, -1.1]
# deltas        [-0.425, -0.25, 1.1]        [0.5, -1.1]
ADVANTAGES = [[-0.41875, 0.025, 1.1], [0.225, -1.1, 0.0]]
RETURNS = [[0.08125, 0.275, 1.1], [-0.275, -1.1, 0.0]]  # advantage + value
VALID = [-0.41875, 0.025, 1.1, 0.225, -1.1]


def ppo(**values):
    return Recipe(Settings.model_validate(values))


def by_hand(**values):
    """The recipe of the worked example."""
    return ppo(**({"gamma": 0.5, "lam": 0.5, "whiten_advantages": False, "kl": {"coef": 0.1}} | values))


def step_batch(**values):
    fields = {
        "mask": MASK,
        "rollout_logprobs": LOGPROBS,
        "old_logprobs": LOGPROBS,
        "rewards": SCORES,
        "values": VALUES,
        "ref_logprobs": REF_LOGPROBS,
        "group_ids": torch.tensor([0, 1]),
    }
    return StepBatch(**(fields | values))


def assert_close(tensor, numbers):
    torch.testing.assert_close(tensor, torch.tensor(numbers), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- needs


def test_it_needs_a_value_model_and_a_reference():
    assert ppo().needs == Needs(value_model=True, reference=True)


def test_without_a_penalty_it_needs_no_reference():
    assert ppo(kl={"coef": 0}).needs == Needs(value_model=True, reference=False)


def test_a_coefficient_of_zero_cannot_be_steered():
    with pytest.raises(ValidationError, match=r"kl\.target steers kl\.coef, which is 0"):
        ppo(kl={"coef": 0, "target": 6.0})


# ------------------------------------------------------------------------------------------- registry


def test_algorithms_are_found_by_the_name_of_their_file():
    assert "ppo" in algorithm_names()
    assert "base" not in algorithm_names()
    assert settings_class("ppo") is Settings
    assert isinstance(make_algorithm(Settings()), Recipe)


@pytest.mark.parametrize("name", algorithm_names())
def test_settings_of_an_algorithm_lead_back_to_it(name):
    chosen = settings_class(name)()
    assert chosen.name == name
    recipe = make_algorithm(chosen)
    assert recipe.settings == chosen
    assert isinstance(recipe.needs, Needs)


def test_an_unknown_algorithm_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"algorithm\.name='base' is not known; there are: .*ppo"):
        settings_class("base")


# ------------------------------------------------------------------------------------------- estimate


def test_advantages_and_returns_of_an_example_worked_out_by_hand():
    estimates, _ = by_hand().estimate(step_batch())
    assert_close(estimates.advantages, ADVANTAGES)
    assert_close(estimates.returns, RETURNS)


def test_metrics_of_the_example_are_over_its_five_tokens():
    _, metrics = by_hand().estimate(step_batch())
    returns, values = [0.08125, 0.275, 1.1, -0.275, -1.1], [0.5, 0.25, 0.0, -0.5, 0.0]
    residuals = [one - other for one, other in zip(returns, values, strict=True)]
    assert metrics == pytest.approx(
        {
            "kl_coef": 0.1,
            "value_mean": 0.05,
            "return_mean": 0.01625,
            "advantage_std": statistics.pstdev(VALID),
            "explained_variance": 1 - statistics.pvariance(residuals) / statistics.pvariance(returns),
        },
        rel=1e-5,
    )


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_valid_tokens():
    estimates, metrics = by_hand(whiten_advantages=True).estimate(step_batch())
    mean, deviation = statistics.mean(VALID), statistics.stdev(VALID)
    white = [(number - mean) / deviation for number in VALID]
    assert_close(estimates.advantages, [white[:3], [*white[3:], 0.0]])
    assert_close(estimates.returns, RETURNS)
    assert metrics["advantage_std"] == pytest.approx(statistics.pstdev(VALID), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "row", "penalties"),
    [
        ("k1", 0, [0.5, 0.0, -1.0]),
        ("abs", 0, [0.5, 0.0, 1.0]),
        ("k2", 0, [0.125, 0.0, 0.5]),
        ("k3", 0, [math.exp(-0.5) - 0.5, 0.0, math.e - 2.0]),
    ],
)
def test_each_estimator_penalizes_by_its_own_formula(estimator, row, penalties):
    recipe = by_hand(gamma=0.0, kl={"coef": 0.1, "estimator": estimator})
    estimates, _ = recipe.estimate(step_batch(values=torch.zeros(2, 3)))
    scores = [0.0, 0.0, 1.0]
    expected = [score - 0.1 * penalty for score, penalty in zip(scores, penalties, strict=True)]
    assert_close(estimates.returns[row], expected)  # with gamma 0 and no value a return is its token's reward


def test_without_a_reference_the_reward_is_the_score_alone():
    recipe = by_hand(gamma=1.0, lam=1.0, kl={"coef": 0})
    estimates, metrics = recipe.estimate(step_batch(ref_logprobs=None, values=torch.zeros(2, 3)))
    assert_close(estimates.returns, [[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    assert metrics["kl_coef"] == 0


def test_a_token_of_the_environment_is_passed_over():
    with_gap = step_batch(
        mask=torch.tensor([[True, False, True, True]]),
        old_logprobs=torch.tensor([[-1.0, math.nan, -2.0, -3.0]]),
        rollout_logprobs=torch.zeros(1, 4),
        ref_logprobs=torch.tensor([[-1.5, math.nan, -2.0, -2.0]]),
        values=torch.tensor([[0.5, math.nan, 0.25, 0.0]]),
        rewards=torch.tensor([1.0]),
        group_ids=torch.tensor([0]),
    )
    estimates, metrics = by_hand().estimate(with_gap)
    assert_close(estimates.advantages, [[-0.41875, 0.0, 0.025, 1.1]])
    assert_close(estimates.returns, [[0.08125, 0.0, 0.275, 1.1]])
    assert all(math.isfinite(value) for value in metrics.values())


def test_estimates_have_no_gradient():
    estimates, _ = by_hand().estimate(step_batch(old_logprobs=LOGPROBS.clone().requires_grad_()))
    assert not estimates.advantages.requires_grad
    assert not estimates.returns.requires_grad


@settings(max_examples=60, deadline=None)
@given(st.floats(-2, 2, width=32), st.integers(1, 9))
def test_advantages_without_spread_give_a_deviation_that_is_a_number(score, length):
    batch = step_batch(
        mask=torch.ones(3, length, dtype=torch.bool),
        old_logprobs=torch.zeros(3, length),
        rollout_logprobs=torch.zeros(3, length),
        ref_logprobs=None,
        values=torch.zeros(3, length),
        rewards=torch.full((3,), score),
        group_ids=torch.arange(3),
    )
    _, metrics = ppo(gamma=1, lam=1, kl={"coef": 0}).estimate(batch)
    assert metrics["advantage_std"] == pytest.approx(0, abs=1e-6)
    json.dumps(metrics, allow_nan=False)


# ----------------------------------------------------------------------------------------- controller


def controlled(*, value_warmup_steps=0, **kl):
    kl = {"coef": 0.1, "target": 2.0, "horizon": 100} | kl
    return by_hand(kl=kl, value_warmup_steps=value_warmup_steps)


def run_step(recipe, step=0):
    """What the learner calls in a step; returns the metrics."""
    _, metrics = recipe.estimate(step_batch())
    if recipe.trains_policy(step):
        recipe.after_updates(0.0)
    return metrics


def test_the_controller_moves_the_coefficient_after_the_step_that_it_measured():
    recipe = controlled()
    first, second = run_step(recipe), run_step(recipe)
    # KL a response (-0.5 + 1) / 2 = 0.25, far below 2: x (1 - 0.2 * 2 samples / 100)
    assert first["kl_coef"] == 0.1
    assert second["kl_coef"] == pytest.approx(0.1 * 0.996, rel=1e-12)
    assert recipe.kl_coef == pytest.approx(0.1 * 0.996**2, rel=1e-12)


def test_a_kl_near_its_target_moves_the_coefficient_in_proportion():
    recipe = controlled(target=0.2272727)  # 0.25 is a tenth above
    run_step(recipe)
    assert recipe.kl_coef == pytest.approx(0.1 * (1 + 0.1 * 2 / 100), rel=1e-6)


def test_a_kl_far_above_its_target_raises_the_coefficient():
    recipe = controlled(target=0.01)
    run_step(recipe)
    assert recipe.kl_coef == pytest.approx(0.1 * 1.004, rel=1e-12)


def test_steps_of_the_value_model_alone_leave_the_coefficient_where_it_is():
    recipe = controlled(value_warmup_steps=2)
    coefs = [run_step(recipe, step)["kl_coef"] for step in range(4)]
    assert coefs == pytest.approx([0.1, 0.1, 0.1, 0.1 * 0.996], rel=1e-12)
    assert coefs[:3] == [0.1] * 3


def test_the_controller_hears_of_a_step_once():
    recipe = controlled()
    run_step(recipe)
    coef = recipe.kl_coef
    recipe.after_updates(0.0)
    assert recipe.kl_coef == coef


def test_the_state_of_the_controller_goes_through_a_checkpoint():
    before = controlled()
    run_step(before)
    after = controlled()
    assert after.kl_coef != before.kl_coef
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.kl_coef == before.kl_coef
    assert after.estimate(step_batch())[1] == before.estimate(step_batch())[1]
    assert after.state_dict() == before.state_dict()


def test_a_fixed_coefficient_stays_and_has_no_state():
    recipe = by_hand()
    run_step(recipe)
    assert recipe.kl_coef == 0.1
    assert recipe.state_dict() == {"kl_controller": None}
    recipe.load_state_dict({"kl_controller": {"coef": 7.0}})
    assert recipe.kl_coef == 0.1


def test_a_controller_that_starts_on_a_checkpoint_without_one_keeps_its_own_coefficient():
    recipe = controlled()
    recipe.load_state_dict({"kl_controller": None})
    assert recipe.kl_coef == 0.1


# ----------------------------------------------------------------------------------------- objectives


def micro_batch(*, mask=None, advantages=None, old_values=None, returns=None, num_tokens=None):
    mask = MASK if mask is None else mask
    return MicroBatch(
        mask=mask,
        old_logprobs=torch.zeros(mask.shape),
        advantages=torch.ones(mask.shape) if advantages is None else advantages,
        old_values=torch.zeros(mask.shape) if old_values is None else old_values,
        returns=torch.zeros(mask.shape) if returns is None else returns,
        num_tokens=int(mask.sum()) if num_tokens is None else num_tokens,
        num_sequences=int(mask.any(1).sum()),
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 1.0, -1.3),  # clipped at 1 + clip_high
        (1.5, -1.0, 1.5),
        (0.5, -1.0, 0.9),  # clipped at 1 - clip_low
        (0.5, 1.0, -0.5),
        (9.0, -1.0, 3.0),  # bounded by dual_clip
    ],
)
def test_the_policy_loss_of_one_token_is_clipped_on_the_side_of_its_advantage(ratio, advantage, loss):
    recipe = ppo(clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    one = torch.ones(1, 1, dtype=torch.bool)
    micro = micro_batch(mask=one, advantages=torch.full((1, 1), advantage))
    objective, _ = recipe.policy_objective(torch.full((1, 1), math.log(ratio)), torch.zeros(1, 1), micro)
    assert float(objective) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"value_clip": None}, 0.5),  # (1 - 2)^2 / 2
        ({"value_clip": 0.25}, 1.53125),  # (0.25 - 2)^2 / 2
        ({"value_clip": 0.25, "value_coef": 0.5}, 0.765625),
    ],
)
def test_the_value_loss_of_one_token_is_clipped_around_the_old_value(settings, loss):
    micro = micro_batch(mask=torch.ones(1, 1, dtype=torch.bool), returns=torch.full((1, 1), 2.0))
    objective, stats = ppo(**settings).value_objective(torch.ones(1, 1), micro)
    assert float(objective) == pytest.approx(loss, rel=1e-6)
    assert float(stats["clip_fraction"]) == (settings["value_clip"] is not None)


def test_the_entropy_bonus_lowers_the_loss_by_its_coefficient_times_the_mean():
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]], requires_grad=True)
    logprobs = torch.zeros(2, 3)
    plain, _ = ppo().policy_objective(logprobs, entropy, micro_batch())
    with_bonus, _ = ppo(entropy_coef=0.5).policy_objective(logprobs, entropy, micro_batch())
    assert float(plain) == pytest.approx(-1.0)  # ratio 1, advantage 1
    assert with_bonus.item() == pytest.approx(-1.0 - 0.5 * 3.0)
    with_bonus.backward()
    assert_close(entropy.grad, [[-0.1, -0.1, -0.1], [-0.1, -0.1, 0.0]])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_shares_of_the_pieces_add_up_to_the_whole_in_value_and_gradient(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, 0] = True
    logprobs, entropy, values, old, advantages, old_values, returns = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(7)
    )
    recipe = ppo(entropy_coef=0.1, value_coef=0.7, dual_clip=2.0)

    def objectives(rows):
        inputs = [each[rows].clone().requires_grad_() for each in (logprobs, entropy, values)]
        micro = MicroBatch(
            mask=mask[rows],
            old_logprobs=old[rows],
            advantages=advantages[rows],
            old_values=old_values[rows],
            returns=returns[rows],
            num_tokens=int(mask.sum()),
            num_sequences=int(mask.any(1).sum()),
        )
        losses = [
            recipe.policy_objective(inputs[0], inputs[1], micro)[0],
            recipe.value_objective(inputs[2], micro)[0],
        ]
        sum(losses).backward()
        return torch.stack(losses).detach(), torch.stack([each.grad for each in inputs])

    order = data.draw(st.permutations(range(shape[0])))
    cut = data.draw(st.integers(0, shape[0]))
    whole_losses, whole_gradients = objectives(order)
    pieces = [objectives(rows) for rows in (order[:cut], order[cut:])]
    torch.testing.assert_close(sum(losses for losses, _ in pieces), whole_losses)
    torch.testing.assert_close(torch.cat([gradients for _, gradients in pieces], dim=1), whole_gradients)


def test_a_piece_without_samples_is_worth_nothing():
    nothing = torch.zeros(0, 0)
    micro = micro_batch(mask=torch.zeros(0, 0, dtype=torch.bool), num_tokens=9)
    recipe = ppo(entropy_coef=0.1)
    assert float(recipe.policy_objective(nothing, nothing, micro)[0]) == 0.0
    assert float(recipe.value_objective(nothing, micro)[0]) == 0.0


# ---------------------------------------------------------------------------------- beside the surrogate


def test_the_first_steps_may_train_the_value_model_alone():
    recipe = ppo(value_warmup_steps=2)
    assert [recipe.trains_policy(step) for step in range(4)] == [False, False, True, True]


def test_a_penalty_in_the_loss_leaves_the_rewards_alone():
    in_loss = {"coef": 0.1, "placement": "loss", "estimator": "k2"}
    recipe = by_hand(gamma=1.0, lam=1.0, kl=in_loss)
    assert recipe.needs.reference
    estimates, metrics = recipe.estimate(step_batch(values=torch.zeros(2, 3)))
    assert_close(estimates.returns, [[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    assert metrics["kl_coef"] == 0.1


@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [
        ("token_mean", -(1 + 2 + 3 + 4 + 5) / 5),
        ("seq_mean_token_sum", -(6 + 9) / 2),
        ("seq_mean_token_mean", -(2 + 4.5) / 2),
        ("seq_mean_token_sum_norm", -(6 + 9) / 2 / 10),
    ],
)
def test_tokens_become_a_loss_as_the_settings_say(aggregation, loss):
    micro = micro_batch(advantages=torch.tensor([[1.0, 2, 3], [4, 5, 9]]))
    recipe = ppo(aggregation=aggregation, aggregation_scale=10)
    assert float(recipe.policy_objective(torch.zeros(2, 3), torch.zeros(2, 3), micro)[0]) == pytest.approx(
        loss
    )


def test_weights_multiply_the_loss_of_their_token():
    micro = micro_batch(advantages=torch.tensor([[1.0, 2, 3], [4, 5, 9]]))
    weighted = dataclasses.replace(micro, weights=torch.tensor([[0.5, 0, 1], [2, 1, 9]]))
    loss, _ = ppo().policy_objective(torch.zeros(2, 3), torch.zeros(2, 3), weighted)
    assert float(loss) == pytest.approx(-(0.5 + 3 + 8 + 5) / 5)
