"""Trust region policy optimization: the natural gradient, as far as the KL to the old policy allows.

Schulman et al. 2015, "Trust Region Policy Optimization", arXiv:1502.05477:

    minimise    L(new) = mean(-r A)                       (eq. 14, on the samples of the batch)
    subject to  mean KL(old || new) <= max_kl

solved by one step a batch: along F^-1 g, with g the gradient of L and F the Hessian of the KL, both over the
whole batch (section 6, appendix C); of the fractions 1, 1/2, 1/4, ... of the longest step that the quadratic
model of the KL allows, the first that improves L and keeps the KL. The KL is that of the whole distribution
over the vocabulary, averaged over the chosen tokens. Advantages and value model are those of `ppo`.

Assumes parameters that are whole on every rank and float32 (`learner.zero_stage=0`), and a small model: a
pass holds the logits of its micro-batch, and an iteration of conjugate gradients costs about as much as two
updates of `ppo`. `learner.policy_optimizer` has no effect. Edge cases: where no fraction will do, the policy
stays as it was (`policy_step_fraction` is 0); a penalty in the loss and the entropy bonus are parts of L, and
so of what has to improve.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from rlhf_dist.algorithms.base import MicroBatch, Needs, Stats, TrustRegion
from rlhf_dist.algorithms.parts.critic import CriticRecipe, CriticSettings
from rlhf_dist.algorithms.parts.surrogate import plain_surrogate


class Settings(CriticSettings):
    """Settings of `trpo`."""

    name: Literal["trpo"] = "trpo"
    """This recipe."""
    num_epochs: int = Field(default=4, ge=1, le=64)
    """Passes of the value model over each batch of experience. The policy makes one step a batch."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer updates of the value model a pass."""
    max_kl: float = Field(default=0.01, gt=0)
    """Mean KL a token, in nats, from the old policy that a step of the policy may reach."""
    cg_iterations: int = Field(default=10, ge=1)
    """Iterations of conjugate gradients at most, a product with the Fisher matrix each."""
    cg_damping: float = Field(default=0.1, ge=0)
    """Added to the diagonal of the Fisher matrix. Larger turns the step towards the plain gradient."""
    backtrack_tries: int = Field(default=10, ge=1)
    """Fractions 1, 1/2, 1/4, ... of the step that the line search tries."""

    @model_validator(mode="after")
    def _one_bound(self) -> Settings:
        if self.target_kl is not None:
            raise ValueError(
                f"trpo makes one step of the policy a batch, so target_kl={self.target_kl} has nothing to "
                "stop; set max_kl, which bounds that step"
            )
        return self


class Recipe(CriticRecipe):
    """The `trpo` algorithm."""

    settings: Settings

    @property
    def needs(self) -> Needs:
        settings = self.settings
        region = TrustRegion(
            settings.max_kl, settings.cg_iterations, settings.cg_damping, settings.backtrack_tries
        )
        return Needs(value_model=True, reference=settings.kl.coef > 0, trust_region=region)

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        return plain_surrogate(self.settings, logprobs, micro)
