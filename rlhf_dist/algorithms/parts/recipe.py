"""What every recipe does: a surrogate, plus the KL to the reference, minus the entropy bonus."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_dist.algorithms.base import AlgorithmSettings, Estimates, MicroBatch, Needs, Stats, StepBatch
from rlhf_dist.algorithms.parts.kl import KLPenalty
from rlhf_dist.algorithms.parts.surrogate import total
from rlhf_dist.ops.masked import masked_mean


class PolicyRecipe:
    """A recipe without a value model; a subclass says `estimate` and `surrogate`."""

    settings: AlgorithmSettings

    def __init__(self, settings: AlgorithmSettings) -> None:
        self.settings = settings
        self._kl = KLPenalty(settings.kl)

    @property
    def needs(self) -> Needs:
        return Needs(value_model=False, reference=self.settings.kl.coef > 0)

    @property
    def kl_coef(self) -> float:
        """The coefficient of the next step's KL penalty, once `after_updates` was called."""
        return self._kl.coef

    def trains_policy(self, step: int) -> bool:  # noqa: ARG002 - a recipe with warm-up steps reads it
        return True

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        raise NotImplementedError

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        """The policy loss without its penalties. The statistics have `approx_kl_k3`."""
        raise NotImplementedError

    def policy_objective(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
    ) -> tuple[torch.Tensor, Stats]:
        loss, stats = self.surrogate(logprobs, micro)
        penalty = self._kl.loss_of_tokens(logprobs, micro.ref_logprobs, micro.mask)
        if penalty is not None:
            loss = loss + total(self.settings, penalty, micro)
            stats = stats | {"kl_loss": masked_mean(penalty.detach(), micro.mask)}
        if self.settings.entropy_coef > 0:
            loss = loss - self.settings.entropy_coef * total(self.settings, entropy, micro)
        return loss, stats

    def value_objective(self, values: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        raise NotImplementedError(f"{self.settings.name} has no value model")

    def after_updates(self, approx_kl: float) -> None:  # noqa: ARG002 - `ppo_kl` reads it
        self._kl.end_step()

    def state_dict(self) -> dict[str, Any]:
        return {"kl_controller": self._kl.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kl.load_state_dict(state["kl_controller"])


def spread_of(x: torch.Tensor, mask: torch.Tensor) -> float:
    """The standard deviation over valid tokens."""
    return float(variance(x, mask)) ** 0.5


def variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Two passes: E[x^2] - E[x]^2 is below 0 where rounding has the last word."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
