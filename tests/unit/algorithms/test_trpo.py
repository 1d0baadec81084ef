"""TRPO: the surrogate by hand, and what the settings refuse. The step: tests/unit/engines."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from rlhf_dist.algorithms.base import TrustRegion

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 1.5, 9.0])
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
def test_the_loss_of_one_token_is_the_ratio_times_the_advantage(ratio, advantage, recipe, micro_batch):
    micro = micro_batch(mask=ONE, advantages=torch.full((1, 1), advantage))
    logprobs = torch.full((1, 1), math.log(ratio))
    loss, stats = recipe("trpo").policy_objective(logprobs, torch.zeros(1, 1), micro)
    assert float(loss) == pytest.approx(-ratio * advantage, rel=1e-5)
    assert float(stats["ratio_mean"]) == pytest.approx(ratio, rel=1e-5)
    assert not any("clip" in name for name in stats)


def test_the_trust_region_is_that_of_the_settings(recipe):
    made = recipe("trpo", max_kl=0.03, cg_iterations=7, cg_damping=0.2, backtrack_tries=5)
    assert made.needs.trust_region == TrustRegion(
        max_kl=0.03, cg_iterations=7, cg_damping=0.2, backtrack_tries=5
    )


def test_a_warm_up_trains_the_value_model_alone(recipe):
    made = recipe("trpo", value_warmup_steps=2)
    assert [made.trains_policy(step) for step in range(4)] == [False, False, True, True]


def test_an_early_stop_has_nothing_to_stop(recipe):
    with pytest.raises(ValidationError, match=r"target_kl=0\.01 has nothing to stop; set max_kl"):
        recipe("trpo", target_kl=0.01)
