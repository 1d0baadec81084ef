"""REINFORCE++: PPO's clipped surrogate without a value model, on returns whitened over the whole batch.

Hu et al. 2025, "REINFORCE++", arXiv:2501.03262:

    G_t = sum over the later tokens of gamma^k (r - kl_coef kl),   A = (G - mean(G)) / std(G)

with the KL to the reference on each token and statistics over all valid tokens of the global batch. With
`baseline: group_mean` (REINFORCE++-baseline) the mean score of the responses to the same prompt is taken
off first.

Assumes that one scale fits all prompts. Edge case: a batch in which all returns are equal has advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from rlhf_dist.algorithms.base import Estimates, MicroBatch, Stats, StepBatch
from rlhf_dist.algorithms.parts.recipe import PolicyRecipe, spread_of
from rlhf_dist.algorithms.parts.surrogate import ClipSettings, clipped_surrogate
from rlhf_dist.ops.masked import masked_mean, masked_whiten
from rlhf_dist.ops.returns import discounted_returns, group_advantages, shape_rewards


class Settings(ClipSettings):
    """Settings of `reinforce_pp`."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    """This recipe."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    baseline: Literal["none", "group_mean"] = "none"
    """What is taken off each score before returns are whitened."""

    @property
    def min_samples_per_prompt(self) -> int:
        return 2 if self.baseline == "group_mean" else 1


class Recipe(PolicyRecipe):
    """The `reinforce_pp` algorithm."""

    settings: Settings

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        mask, scores = batch.mask, batch.rewards
        penalty, coef = self._kl.begin_step(batch.old_logprobs, batch.ref_logprobs, mask)
        if self.settings.baseline == "group_mean":
            scores = group_advantages(scores, batch.group_ids, kind="reinforce_baseline")
        rewards = shape_rewards(scores, penalty, mask, 1.0)
        returns = discounted_returns(rewards, mask, gamma=self.settings.gamma)
        metrics = {
            "kl_coef": coef,
            "return_mean": float(masked_mean(returns, mask)),
            "advantage_std": spread_of(returns, mask),
        }
        return Estimates(masked_whiten(returns, mask), None), metrics

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        return clipped_surrogate(self.settings, logprobs, micro)
