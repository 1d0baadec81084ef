"""The plain policy gradient.

Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning":

    L_t = -(G_t - b) log pi(token t),   G_t = r_t + gamma G_t+1

with no baseline (b = 0) or the mean return of the batch's tokens, which lowers the variance. That mean holds
the response itself, which shrinks its part of the gradient by about its share of the batch's tokens.

Assumes that the policy is the one that sampled. Only a step's first update is, and there is no ratio that
would correct the later ones: the default is one epoch of one minibatch.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from rlhf_dist.algorithms.base import AlgorithmSettings, Estimates, MicroBatch, Stats, StepBatch
from rlhf_dist.algorithms.parts.recipe import PolicyRecipe, spread_of
from rlhf_dist.algorithms.parts.surrogate import shift_stats, total
from rlhf_dist.ops.masked import keep, masked_mean
from rlhf_dist.ops.returns import discounted_returns, shape_rewards


class Settings(AlgorithmSettings):
    """Settings of `reinforce`."""

    name: Literal["reinforce"] = "reinforce"
    """This recipe."""
    num_epochs: int = Field(default=1, ge=1, le=64)
    """Passes over each batch of experience. The first is on-policy, the others are not."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    baseline: Literal["none", "batch_mean"] = "batch_mean"
    """What is taken off each return."""

    @model_validator(mode="after")
    def _no_ratio(self) -> Settings:
        if self.correction.old_logprobs == "rollout":
            raise ValueError(
                "reinforce has no ratio that correction.old_logprobs=rollout could change; "
                "correct with correction.kind"
            )
        return self


class Recipe(PolicyRecipe):
    """The `reinforce` algorithm."""

    settings: Settings

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        mask = batch.mask
        penalty, coef = self._kl.begin_step(batch.old_logprobs, batch.ref_logprobs, mask)
        rewards = shape_rewards(batch.rewards, penalty, mask, 1.0)
        returns = discounted_returns(rewards, mask, gamma=self.settings.gamma)
        mean = masked_mean(returns, mask)
        advantages = returns
        if self.settings.baseline == "batch_mean":
            advantages = keep(returns - mean, mask)
        metrics = {
            "kl_coef": coef,
            "return_mean": float(mean),
            "advantage_std": spread_of(advantages, mask),
        }
        return Estimates(advantages, None), metrics

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        per_token = -micro.advantages * keep(logprobs, micro.mask)
        if micro.weights is not None:
            per_token = per_token * micro.weights
        return total(self.settings, per_token, micro), shift_stats(logprobs, micro)
