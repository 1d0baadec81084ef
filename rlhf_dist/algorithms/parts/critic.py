"""Recipes with a learned value model: generalized advantage estimation and the value loss."""

from __future__ import annotations

import torch
from pydantic import Field

from rlhf_dist.algorithms.base import AlgorithmSettings, Estimates, MicroBatch, Needs, Stats, StepBatch
from rlhf_dist.algorithms.parts.recipe import PolicyRecipe, spread_of, variance
from rlhf_dist.ops.losses import value_loss
from rlhf_dist.ops.masked import masked_mean, masked_whiten
from rlhf_dist.ops.returns import gae, shape_rewards

NO_SPREAD = 1e-12
"""Variance of returns below which there is nothing to explain: rounding, not differences."""


class CriticSettings(AlgorithmSettings):
    """Of recipes with a value model."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the value model (less variance), 1 the sampled return (less bias)."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from its old one and still be rewarded for it. None: plain squared error."""
    value_coef: float = Field(default=1.0, gt=0)
    """Weight of the value loss."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First learner steps, in which only the value model is trained."""
    whiten_advantages: bool = True
    """Scale the batch's advantages to mean 0 and variance 1."""


class CriticRecipe(PolicyRecipe):
    """A recipe with a value model; a subclass says `surrogate`."""

    settings: CriticSettings

    @property
    def needs(self) -> Needs:
        return Needs(value_model=True, reference=self.settings.kl.coef > 0)

    def trains_policy(self, step: int) -> bool:
        return step >= self.settings.value_warmup_steps

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        settings, mask = self.settings, batch.mask
        assert batch.values is not None
        penalty, coef = self._kl.begin_step(batch.old_logprobs, batch.ref_logprobs, mask)
        rewards = shape_rewards(batch.rewards, penalty, mask, 1.0)
        advantages, returns = gae(rewards, batch.values, mask, gamma=settings.gamma, lam=settings.lam)
        metrics = {
            "kl_coef": coef,
            "explained_variance": _explained_variance(batch.values, returns, mask),
            "value_mean": float(masked_mean(batch.values, mask)),
            "return_mean": float(masked_mean(returns, mask)),
            "advantage_std": spread_of(advantages, mask),
        }
        if settings.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        return Estimates(advantages, returns), metrics

    def value_objective(self, values: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        assert micro.old_values is not None
        assert micro.returns is not None
        loss, stats = value_loss(
            values,
            micro.old_values,
            micro.returns,
            micro.mask,
            clip=self.settings.value_clip,
            num_tokens=micro.num_tokens,
            num_sequences=micro.num_sequences,
        )
        return self.settings.value_coef * loss, {"clip_fraction": stats["clip_fraction"]}


def _explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value model, 0 one that knows nothing."""
    whole = variance(returns, mask)
    if whole < NO_SPREAD:
        return 0.0
    return float(1 - variance(returns - values, mask) / whole)
