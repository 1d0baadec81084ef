"""What an algorithm is to the learner.

The learner calls `estimate` once a step on the whole batch, then `policy_objective` (and
`value_objective`, if the recipe needs a value model) on each micro-batch. The same code runs on every
rank on the same whole batch, so estimates and the state that they update agree without communication.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator

from rlhf_dist.algorithms.parts.correction import CorrectionSettings
from rlhf_dist.algorithms.parts.kl import KLSettings
from rlhf_dist.settings import Section

Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm"]

STATE_FILE = "algorithm.pt"
"""In a checkpoint: what `Algorithm.state_dict` gave."""

Stats = dict[str, torch.Tensor]
"""Scalars by metric name; means are over the valid tokens of the piece they were made from."""


@dataclass(frozen=True)
class TrustRegion:
    """How far a step of the policy may go, and how it is found: see `ops.trust_region`."""

    max_kl: float
    """Mean KL(old || new) a token, in nats."""
    cg_iterations: int
    """Of conjugate gradients, at most."""
    cg_damping: float
    """Added to the diagonal of the Fisher matrix."""
    backtrack_tries: int
    """Fractions 1, 1/2, 1/4, ... of the step that the line search tries."""


@dataclass(frozen=True)
class Needs:
    """Models that the driver must start for a recipe, and how the learner is to step."""

    value_model: bool
    reference: bool
    trust_region: TrustRegion | None = None
    """The policy makes one such step a batch. None: its optimizer steps, minibatch by minibatch."""


class AlgorithmSettings(Section):
    """What every algorithm has."""

    name: str
    """File name in `rlhf_dist/algorithms`; `ppo` where none is given."""
    num_epochs: int = Field(default=4, ge=1, le=64)
    """Passes over each batch of experience. The first is on-policy, the others are not."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer updates a pass."""
    aggregation: Aggregation = "token_mean"
    """From tokens to the loss: the mean of all tokens; or the mean over responses of each one's sum, of
    each one's mean, or of each one's sum over a constant. Counts are the whole minibatch's."""
    aggregation_scale: float = Field(default=1000.0, gt=0)
    """Tokens that `seq_mean_token_sum_norm` divides by; often the most tokens of a response."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = Field(default=None, gt=0)
    """Mean KL a token, in nats, of the policy from the one before the step. An update that finds more is
    the step's last. None: every epoch is done."""
    kl: KLSettings = KLSettings()
    """The penalty for leaving the reference policy."""
    correction: CorrectionSettings = CorrectionSettings()
    """The gap between the policy that sampled and the one that the learner starts a step from."""

    @property
    def min_samples_per_prompt(self) -> int:
        """What `rollout.samples_per_prompt` must be at least."""
        return 1

    @model_validator(mode="after")
    def _target_needs_coef(self) -> AlgorithmSettings:
        if self.kl.target is not None and self.kl.coef == 0:
            raise ValueError("kl.target steers kl.coef, which is 0; start it above 0")
        return self

    @model_validator(mode="after")
    def _early_stop_measures_the_learner(self) -> AlgorithmSettings:
        if self.target_kl is not None and self.correction.old_logprobs == "rollout":
            raise ValueError(
                f"target_kl={self.target_kl:g} stops a step by how far the policy moved in it, and "
                "correction.old_logprobs=rollout would have it measure the sampler's gap as well; set "
                "correction.old_logprobs=learner, or target_kl=null"
            )
        return self


@dataclass(frozen=True)
class StepBatch:
    """All samples of a learner step, right-padded. The same on every rank."""

    mask: torch.Tensor  # [B, T] bool: the policy chose the token
    rollout_logprobs: torch.Tensor  # [B, T] by the engine that sampled
    old_logprobs: torch.Tensor  # [B, T] by the learner, before the first update of the step
    rewards: torch.Tensor  # [B]
    values: torch.Tensor | None  # [B, T] by the learner, before the first update of the step
    ref_logprobs: torch.Tensor | None  # [B, T]
    group_ids: torch.Tensor  # [B] prompt ordinals: the samples of one prompt are a group


@dataclass(frozen=True)
class Estimates:
    """What the updates of a step aim at."""

    advantages: torch.Tensor  # [B, T]
    returns: torch.Tensor | None  # [B, T], None without a value model


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward pass, and how many tokens and sequences its whole minibatch has."""

    mask: torch.Tensor  # [b, T]
    old_logprobs: torch.Tensor  # [b, T] what ratios are taken to: see `CorrectionSettings.old_logprobs`
    advantages: torch.Tensor  # [b, T]
    old_values: torch.Tensor | None  # [b, T]
    returns: torch.Tensor | None  # [b, T]
    num_tokens: int
    """Valid tokens of the minibatch over all ranks: what token means divide by."""
    num_sequences: int
    """Samples with at least one valid token of the minibatch over all ranks."""
    weights: torch.Tensor | None = None  # [b, T] of the correction, None: all 1
    ref_logprobs: torch.Tensor | None = None  # [b, T], None without a reference

    def to(self, device: torch.device) -> MicroBatch:
        """The same piece on another device."""
        tensors = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


class Algorithm(Protocol):
    """A recipe. `Settings` and `Recipe` are the two names each file of this folder defines."""

    @property
    def settings(self) -> AlgorithmSettings:
        """The recipe's section of the configuration."""

    @property
    def needs(self) -> Needs:
        """Which models and which kind of step the recipe works with."""

    def trains_policy(self, step: int) -> bool:
        """Whether this learner step (from 0) updates the policy, or the value model only."""

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        """Advantages and returns of a step, with metrics; may update the recipe's own state."""

    def policy_objective(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
    ) -> tuple[torch.Tensor, Stats]:
        """This piece's share of the policy loss, to be summed over the pieces of a minibatch.

        Its statistics have `approx_kl_k3`, of KL(old || new).
        """

    def value_objective(self, values: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        """This piece's share of the value loss, to be summed over the pieces of a minibatch."""

    def after_updates(self, approx_kl: float) -> None:
        """Called when a step has updated the policy, and only then; may update the recipe's own state.

        Args:
            approx_kl: k3 estimate of KL(old || new) a token, of the step's last minibatch over all ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the recipe."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
