"""What holds for every algorithm."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.algorithms import algorithm_names, make_algorithm, settings_class
from rlhf_dist.algorithms.base import MicroBatch, Needs, StepBatch, TrustRegion
from rlhf_dist.config import parse_config
from rlhf_dist.errors import ConfigError
from rlhf_dist.ops.losses import AGGREGATIONS

NEEDS = {
    "dr_grpo": Needs(value_model=False, reference=False),
    "grpo": Needs(value_model=False, reference=True),
    "gspo": Needs(value_model=False, reference=False),
    "ppo": Needs(value_model=True, reference=True),
    "ppo_kl": Needs(value_model=True, reference=True),
    "reinforce": Needs(value_model=False, reference=True),
    "reinforce_pp": Needs(value_model=False, reference=True),
    "rloo": Needs(value_model=False, reference=True),
    "trpo": Needs(value_model=True, reference=True, trust_region=TrustRegion(0.01, 10, 0.1, 10)),
}
GROUPS = {"dr_grpo", "grpo", "gspo", "rloo"}
every_algorithm = pytest.mark.parametrize("name", algorithm_names())


def config(samples_per_prompt=2, **algorithm):
    tree = {
        "run": {"dir": "runs/x"},
        "policy": {"model": "some-policy"},
        "reward": [{"kind": "function", "path": "my_rewards:length"}],
        "data": {"prompts": "prompts.jsonl"},
        "rollout": {"samples_per_prompt": samples_per_prompt},
        "algorithm": algorithm,
    }
    return parse_config(tree, source="here")


# ------------------------------------------------------------------------------------------- settings


@every_algorithm
def test_its_name_alone_is_a_configuration(name):
    chosen = config(name=name).algorithm
    assert chosen == settings_class(name)()
    assert make_algorithm(chosen).needs == NEEDS[name]


@every_algorithm
def test_without_a_coefficient_there_is_no_reference(name):
    chosen = config(name=name, kl={"coef": 0}).algorithm
    assert make_algorithm(chosen).needs == replace(NEEDS[name], reference=False)


@every_algorithm
def test_an_unknown_key_is_refused(name):
    with pytest.raises(ConfigError, match=r"unknown key algorithm\.nonsense"):
        config(name=name, nonsense=1)
    with pytest.raises(
        ConfigError, match=r"unknown key algorithm\.kl\.ceof; did you mean algorithm\.kl\.coef"
    ):
        config(name=name, kl={"ceof": 1})


def test_a_key_of_another_algorithm_is_not_suggested():
    with pytest.raises(ConfigError, match=r"unknown key algorithm\.lam") as caught:
        config(name="grpo", lam=0.9)
    assert "did you mean algorithm.lam" not in str(caught.value)


@every_algorithm
def test_a_part_of_the_kl_section_keeps_the_other_defaults(name):
    default, chosen = settings_class(name)().kl, config(name=name, kl={"coef": 0.3}).algorithm.kl
    assert chosen.coef == 0.3
    assert chosen == default.model_copy(update={"coef": 0.3})


@every_algorithm
def test_groups_need_two_responses_a_prompt(name):
    if name in GROUPS:
        with pytest.raises(ConfigError) as caught:
            config(samples_per_prompt=1, name=name)
        assert str(caught.value).splitlines()[1].strip() == (
            f"algorithm.name={name} compares responses to the same prompt: "
            "rollout.samples_per_prompt=1 must be at least 2"
        )
    else:
        assert config(samples_per_prompt=1, name=name).rollout.samples_per_prompt == 1


@pytest.mark.parametrize("name", sorted(set(algorithm_names()) - {"reinforce", "trpo", "ppo_kl"}))
def test_an_early_stop_goes_by_the_policy_before_the_step_not_by_the_samplers(name):
    with pytest.raises(ConfigError) as caught:
        config(name=name, target_kl=0.02, correction={"old_logprobs": "rollout"})
    assert str(caught.value).splitlines()[1].strip() == (
        "algorithm: target_kl=0.02 stops a step by how far the policy moved in it, and "
        "correction.old_logprobs=rollout would have it measure the sampler's gap as well; set "
        "correction.old_logprobs=learner, or target_kl=null"
    )
    assert config(name=name, correction={"old_logprobs": "rollout"}).algorithm.target_kl is None
    assert config(name=name, target_kl=0.02).algorithm.target_kl == 0.02


# ------------------------------------------------------------------------------------------ objectives


def random_recipe(name, aggregation):
    return make_algorithm(
        settings_class(name)(
            aggregation=aggregation,
            aggregation_scale=7.0,
            entropy_coef=0.1,
            kl={"coef": 0.3, "placement": "loss", "estimator": "k2"},
        )
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_shares_of_the_pieces_add_up_to_the_whole_in_value_and_gradient(data):
    recipe = random_recipe(
        data.draw(st.sampled_from(algorithm_names())), data.draw(st.sampled_from(AGGREGATIONS))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    shape = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, 0] = True
    logprobs, entropy, values, old, advantages, old_values, returns, reference = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(8)
    )
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)

    def objectives(rows):
        inputs = [each[rows].clone().requires_grad_() for each in (logprobs, entropy, values)]
        micro = MicroBatch(
            mask=mask[rows],
            old_logprobs=old[rows],
            advantages=advantages[rows] * mask[rows],
            old_values=old_values[rows],
            returns=returns[rows],
            num_tokens=int(mask.sum()),
            num_sequences=int(mask.any(1).sum()),
            weights=weights[rows],
            ref_logprobs=reference[rows],
        )
        losses = [recipe.policy_objective(inputs[0], inputs[1], micro)[0]]
        if recipe.needs.value_model:
            losses.append(recipe.value_objective(inputs[2], micro)[0])
        sum(losses).backward()
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in inputs]
        return torch.stack(losses).detach(), torch.stack(gradients)

    order = data.draw(st.permutations(range(shape[0])))
    cut = data.draw(st.integers(0, shape[0]))
    whole_losses, whole_gradients = objectives(order)
    pieces = [objectives(rows) for rows in (order[:cut], order[cut:])]
    torch.testing.assert_close(sum(losses for losses, _ in pieces), whole_losses)
    torch.testing.assert_close(torch.cat([gradients for _, gradients in pieces], dim=1), whole_gradients)


@every_algorithm
def test_garbage_in_the_padding_reaches_neither_loss_nor_gradient(name, micro_batch):
    micro = micro_batch()
    dirty = [torch.full(micro.mask.shape, math.nan).masked_fill(micro.mask, 0.5) for _ in range(3)]
    logprobs, entropy, reference = (each.requires_grad_() for each in dirty)
    micro = micro_batch(
        ref_logprobs=reference.detach(), old_logprobs=reference.detach(), advantages=micro.mask.float()
    )
    loss, stats = random_recipe(name, "token_mean").policy_objective(logprobs, entropy, micro)
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert (logprobs.grad[~micro.mask] == 0).all()
    assert all(math.isfinite(value) for value in stats.values())


@every_algorithm
def test_a_piece_without_samples_is_worth_nothing(name, micro_batch):
    nothing = torch.zeros(0, 0)
    micro = micro_batch(mask=torch.zeros(0, 0, dtype=torch.bool), num_tokens=9, ref_logprobs=nothing)
    assert float(random_recipe(name, "token_mean").policy_objective(nothing, nothing, micro)[0]) == 0.0


@every_algorithm
def test_the_first_update_follows_the_policy_gradient(name, micro_batch):
    """Where the policy is the old one, the gradient is that of -A log pi, averaged by the token."""
    advantages = torch.tensor([[1.0, 2, 3], [4, 5, 0], [6, 0, 0], [7, 8, 0], [9, 10, 11]])
    logprobs = torch.zeros(5, 3, requires_grad=True)
    recipe = make_algorithm(settings_class(name)(aggregation="token_mean", kl={"coef": 0}))
    recipe.policy_objective(logprobs, torch.zeros(5, 3), micro_batch(advantages=advantages))[0].backward()
    torch.testing.assert_close(logprobs.grad, -advantages / 11)


@every_algorithm
def test_statistics_tell_how_far_the_policy_is_from_the_old_one(name, micro_batch):
    logprobs = torch.full((5, 3), 0.2)
    _, stats = make_algorithm(settings_class(name)()).policy_objective(logprobs, logprobs, micro_batch())
    assert float(stats["approx_kl_k3"]) == pytest.approx(math.exp(0.2) - 1 - 0.2, rel=1e-4)
    assert float(stats["approx_kl"]) == pytest.approx(-0.2, rel=1e-5)


@every_algorithm
def test_the_kl_in_the_loss_is_its_coefficient_times_the_estimate(name, micro_batch):
    logprobs = torch.full((5, 3), 0.4)
    micro = micro_batch(old_logprobs=logprobs, ref_logprobs=torch.zeros(5, 3))
    common = {"aggregation": "token_mean"}
    plain = make_algorithm(settings_class(name)(**common, kl={"coef": 0}))
    with_kl = make_algorithm(
        settings_class(name)(**common, kl={"coef": 0.5, "placement": "loss", "estimator": "k2"})
    )
    without, _ = plain.policy_objective(logprobs, logprobs, micro)
    loss, stats = with_kl.policy_objective(logprobs, logprobs, micro)
    assert float(loss - without) == pytest.approx(0.5 * 0.4**2 / 2, rel=1e-4)
    assert float(stats["kl_loss"]) == pytest.approx(0.5 * 0.4**2 / 2, rel=1e-4)


@every_algorithm
def test_dropped_tokens_do_not_teach(name, micro_batch):
    logprobs = torch.full((5, 3), 0.0, requires_grad=True)
    weights = torch.ones(5, 3)
    weights[2] = 0
    recipe = make_algorithm(settings_class(name)(kl={"coef": 0}))
    recipe.policy_objective(logprobs, logprobs.detach(), micro_batch(weights=weights))[0].backward()
    assert (logprobs.grad[2] == 0).all()
    assert (logprobs.grad[[0, 1], 0] < 0).all()


# ----------------------------------------------------------------------------------------------- steps


def a_step(generator, rows=6, width=4):
    mask = torch.rand(rows, width, generator=generator) < 0.7
    logprobs, old, reference, values = (-torch.rand(rows, width, generator=generator) for _ in range(4))
    return StepBatch(
        mask=mask,
        rollout_logprobs=logprobs,
        old_logprobs=old,
        rewards=torch.randn(rows, generator=generator),
        values=values,
        ref_logprobs=reference,
        group_ids=torch.arange(rows) // 2,
    )


@every_algorithm
def test_the_state_goes_through_a_checkpoint(name):
    chosen = settings_class(name)(kl={"coef": 0.1, "target": 0.5, "horizon": 10})
    before, after = make_algorithm(chosen), make_algorithm(chosen)
    generator = torch.Generator().manual_seed(3)
    for approx_kl in (0.5, 0.5):
        before.estimate(a_step(generator))
        before.after_updates(approx_kl)
    state = json.loads(json.dumps(before.state_dict()))
    assert state != after.state_dict()
    after.load_state_dict(state)
    assert after.state_dict() == before.state_dict()
    batch = a_step(generator)
    (one, metrics), (other, same) = before.estimate(batch), after.estimate(batch)
    assert metrics == same
    torch.testing.assert_close(one.advantages, other.advantages, rtol=0, atol=0)


@every_algorithm
def test_the_coefficient_of_the_kl_moves_when_the_policy_does(name):
    recipe = make_algorithm(settings_class(name)(kl={"coef": 0.1, "target": 0.5, "horizon": 10}))
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):  # steps that train the value model alone
        recipe.estimate(a_step(generator))
        assert recipe.kl_coef == 0.1
    recipe.after_updates(0.01)
    assert recipe.kl_coef != 0.1


@every_algorithm
def test_estimates_are_zero_where_no_token_is_and_metrics_are_numbers(name):
    batch = a_step(torch.Generator().manual_seed(1))
    estimates, metrics = make_algorithm(settings_class(name)()).estimate(batch)
    assert estimates.advantages.shape == batch.mask.shape
    assert (estimates.advantages[~batch.mask] == 0).all()
    assert (estimates.returns is not None) == NEEDS[name].value_model
    json.dumps(metrics, allow_nan=False)
    assert metrics["kl_coef"] == settings_class(name)().kl.coef


@every_algorithm
def test_a_batch_without_a_token_is_no_error(name):
    batch = a_step(torch.Generator().manual_seed(1))
    empty = StepBatch(**(vars(batch) | {"mask": torch.zeros_like(batch.mask)}))
    estimates, metrics = make_algorithm(settings_class(name)()).estimate(empty)
    assert (estimates.advantages == 0).all()
    json.dumps(metrics, allow_nan=False)


@every_algorithm
def test_the_policy_is_trained_from_the_first_step_on(name):
    assert make_algorithm(settings_class(name)()).trains_policy(0)
