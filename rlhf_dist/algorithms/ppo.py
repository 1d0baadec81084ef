"""Proximal policy optimization with a learned value model.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (clipped surrogate, eq. 7; whole loss,
eq. 9), with generalized advantage estimation (Schulman et al. 2016, eq. 16) over response tokens and
the KL to the reference policy as a per-token reward (Ziegler et al. 2019, eq. 2).

Edge case: a response that was cut at the token limit ends its episode there, with value 0 after it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from rlhf_dist.algorithms.base import (
    AlgorithmSettings,
    Estimates,
    MicroBatch,
    Needs,
    Stats,
    StepBatch,
)
from rlhf_dist.ops.kl import AdaptiveKLController, kl_estimate
from rlhf_dist.ops.losses import aggregate, policy_loss, value_loss
from rlhf_dist.ops.masked import masked_mean, masked_whiten
from rlhf_dist.ops.returns import gae, shape_rewards
from rlhf_dist.settings import Section

NO_SPREAD = 1e-12
"""Variance of returns below which there is nothing to explain: rounding, not differences."""


class KLSettings(Section):
    """The penalty for leaving the reference policy, taken off each token's reward."""

    coef: float = Field(default=0.05, ge=0)
    """Weight of the penalty (beta). 0 needs no reference model."""
    estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Estimate of the KL from one sampled token."""
    target: float | None = Field(default=None, gt=0)
    """KL a response, in nats, that the coefficient is steered to. None: the coefficient is fixed."""
    horizon: int = Field(default=10_000, ge=1)
    """Samples over which the coefficient is steered; longer is slower."""


class Settings(AlgorithmSettings):
    """Settings of `ppo`."""

    name: Literal["ppo"] = "ppo"
    """This recipe."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the value model (less variance), 1 the sampled return (less bias)."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound, in multiples of the advantage, on the loss of a bad token whose ratio exploded. None: off."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from its old one and still be rewarded for it. None: plain squared error."""
    value_coef: float = Field(default=1.0, gt=0)
    """Weight of the value loss."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Scale the batch's advantages to mean 0 and variance 1."""
    kl: KLSettings = KLSettings()
    """The penalty for leaving the reference policy."""

    @model_validator(mode="after")
    def _target_needs_coef(self) -> Settings:
        if self.kl.target is not None and self.kl.coef == 0:
            raise ValueError("kl.target steers kl.coef, which is 0; start it above 0")
        return self


class Recipe:
    """The `ppo` algorithm."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._controller: AdaptiveKLController | None = None
        if settings.kl.target is not None:
            self._controller = AdaptiveKLController(settings.kl.coef, settings.kl.target, settings.kl.horizon)

    @property
    def needs(self) -> Needs:
        return Needs(value_model=True, reference=self.settings.kl.coef > 0)

    @property
    def kl_coef(self) -> float:
        """The coefficient of this step."""
        return self._controller.coef if self._controller is not None else self.settings.kl.coef

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        settings, mask = self.settings, batch.mask
        kl = torch.zeros_like(batch.old_logprobs)
        if batch.ref_logprobs is not None:
            kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, settings.kl.estimator)
        coef = self.kl_coef
        rewards = shape_rewards(batch.rewards, kl, mask, coef)
        assert batch.values is not None
        advantages, returns = gae(rewards, batch.values, mask, gamma=settings.gamma, lam=settings.lam)
        metrics = {
            "kl_coef": coef,
            "explained_variance": _explained_variance(batch.values, returns, mask),
            "value_mean": float(masked_mean(batch.values, mask)),
            "return_mean": float(masked_mean(returns, mask)),
            "advantage_std": float(_variance(advantages, mask)) ** 0.5,
        }
        if settings.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        if self._controller is not None:
            kl_of_responses = torch.where(mask, kl, 0.0).sum(dim=1).mean()
            self._controller.update(float(kl_of_responses), n_samples=len(batch.rewards))
        return Estimates(advantages, returns), metrics

    def policy_objective(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
    ) -> tuple[torch.Tensor, Stats]:
        settings = self.settings
        loss, stats = policy_loss(
            logprobs,
            micro.old_logprobs,
            micro.advantages,
            micro.mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            num_tokens=micro.num_tokens,
            num_sequences=micro.num_sequences,
        )
        if settings.entropy_coef > 0:
            bonus = aggregate(entropy, micro.mask, kind="token_mean", num_tokens=micro.num_tokens)
            loss = loss - settings.entropy_coef * bonus
        return loss, stats

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

    def state_dict(self) -> dict[str, Any]:
        return {"kl_controller": self._controller.state_dict() if self._controller is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._controller is not None and state["kl_controller"] is not None:
            self._controller.load_state_dict(state["kl_controller"])


def _explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value model, 0 one that knows nothing."""
    total = _variance(returns, mask)
    if total < NO_SPREAD:
        return 0.0
    return float(1 - _variance(returns - values, mask) / total)


def _variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Two passes: E[x^2] - E[x]^2 is below 0 where rounding has the last word."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
