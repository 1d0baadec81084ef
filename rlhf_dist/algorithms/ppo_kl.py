"""PPO by an adaptive penalty on the KL to the old policy, instead of clipping.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 4:

    L = mean(-r A + beta KL(old || new))                                            (eq. 8)
    after the updates of a step, with d their KL:  d < target / 1.5:  beta / 2
                                                   d > target * 1.5:  beta * 2

KL(old || new) is the k3 estimate r - 1 - log r on tokens that the old policy sampled, which is unbiased in
value and gradient, and never negative. d is measured at a step's last minibatch, before its update: a step
of a single update would always measure 0, so it needs two. `target_kl` may stop a step early as well; it
must then be above `penalty_target` to leave the penalty something to do. The old policy must be the
learner's: from the sampler's, d would be the gap between the two as well.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from rlhf_dist.algorithms.base import MicroBatch, Stats
from rlhf_dist.algorithms.parts.critic import CriticRecipe, CriticSettings
from rlhf_dist.algorithms.parts.surrogate import plain_surrogate, total
from rlhf_dist.ops.kl import kl_estimate
from rlhf_dist.ops.masked import keep

TOLERANCE = 1.5
"""The penalty rests while the KL is within this factor of its target."""
BETA_RANGE = 1e-6, 1e6
"""Beta stays inside, so that a few dozen steps bring it back from either end."""


class Settings(CriticSettings):
    """Settings of `ppo_kl`."""

    name: Literal["ppo_kl"] = "ppo_kl"
    """This recipe."""
    penalty_coef: float = Field(default=1.0, gt=0)
    """Beta at the start of the run."""
    penalty_target: float = Field(default=0.01, gt=0)
    """KL a token, in nats, that beta steers the updates of a step to."""

    @model_validator(mode="after")
    def _kl_can_be_measured(self) -> Settings:
        if self.num_epochs * self.num_minibatches < 2:
            raise ValueError(
                "ppo_kl measures the KL between the updates of a step: "
                "num_epochs x num_minibatches must be at least 2"
            )
        return self

    @model_validator(mode="after")
    def _beta_measures_the_learner(self) -> Settings:
        if self.correction.old_logprobs == "rollout":
            raise ValueError(
                f"name=ppo_kl steers the KL that the updates of a step make to penalty_target="
                f"{self.penalty_target:g}, and correction.old_logprobs=rollout would have it measure the "
                "sampler's gap as well; set correction.old_logprobs=learner, or another name"
            )
        return self

    @model_validator(mode="after")
    def _early_stop_leaves_room(self) -> Settings:
        if self.target_kl is not None and self.target_kl <= self.penalty_target:
            raise ValueError(
                f"target_kl={self.target_kl:g} ends a step before the KL reaches penalty_target="
                f"{self.penalty_target:g}, so the penalty would only ever shrink; set target_kl above it"
            )
        return self


class Recipe(CriticRecipe):
    """The `ppo_kl` algorithm."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.beta = settings.penalty_coef

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        loss, stats = plain_surrogate(self.settings, logprobs, micro)
        log_ratio = keep(logprobs, micro.mask) - keep(micro.old_logprobs, micro.mask)
        shift = kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3", micro.mask)  # [b, T]
        if micro.weights is not None:
            shift = shift * keep(micro.weights, micro.mask)
        beta = torch.tensor(self.beta)
        return loss + self.beta * total(self.settings, shift, micro), stats | {"penalty_coef": beta}

    def after_updates(self, approx_kl: float) -> None:
        super().after_updates(approx_kl)
        factor = 1.0
        if approx_kl < self.settings.penalty_target / TOLERANCE:
            factor = 0.5
        elif approx_kl > self.settings.penalty_target * TOLERANCE:
            factor = 2.0
        lowest, highest = BETA_RANGE
        self.beta = min(max(self.beta * factor, lowest), highest)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.beta = float(state["beta"])
