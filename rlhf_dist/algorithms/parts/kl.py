"""The penalty for leaving the reference policy, as a reward or as a term of the loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from rlhf_dist.ops.kl import AdaptiveKLController, kl_estimate
from rlhf_dist.settings import Section


class KLSettings(Section):
    """The penalty for leaving the reference policy."""

    placement: Literal["reward", "loss"] = "reward"
    """Taken off the reward of what was sampled, or added to the loss and differentiated."""
    coef: float = Field(default=0.05, ge=0)
    """Weight of the penalty (beta). 0 needs no reference model."""
    estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Estimate of the KL from one sampled token. In the loss k2 has the unbiased gradient."""
    target: float | None = Field(default=None, gt=0)
    """KL a response, in nats, that the coefficient is steered to. None: the coefficient is fixed."""
    horizon: int = Field(default=10_000, ge=1)
    """Samples over which the coefficient is steered; longer is slower."""

    @model_validator(mode="after")
    def _estimator_has_a_gradient(self) -> KLSettings:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("estimator=k1 in the loss has a mean gradient of zero; use k2 or k3")
        return self


class LossKLSettings(KLSettings):
    """The penalty for leaving the reference policy, by default in the loss."""

    placement: Literal["reward", "loss"] = "loss"
    """Taken off the reward of what was sampled, or added to the loss and differentiated."""
    coef: float = Field(default=0.04, ge=0)
    """Weight of the penalty (beta). 0 needs no reference model."""
    estimator: Literal["k1", "abs", "k2", "k3"] = "k3"
    """Estimate of the KL from one sampled token. In the loss k2 has the unbiased gradient."""


class NoKLSettings(LossKLSettings):
    """The penalty for leaving the reference policy, by default none."""

    coef: float = Field(default=0.0, ge=0)
    """Weight of the penalty (beta). 0 needs no reference model."""


class KLPenalty:
    """The penalty with its coefficient, which a controller steers where a target is set."""

    def __init__(self, settings: KLSettings) -> None:
        self._settings = settings
        self._coef_of_step = settings.coef
        self._measured: tuple[float, int] | None = None
        self._controller: AdaptiveKLController | None = None
        if settings.target is not None:
            self._controller = AdaptiveKLController(settings.coef, settings.target, settings.horizon)

    @property
    def coef(self) -> float:
        """The coefficient of the next step."""
        return self._controller.coef if self._controller is not None else self._settings.coef

    def begin_step(
        self, logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, mask: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """What to take off the rewards, times its coefficient, and the coefficient of this step.

        The step's KL is measured here, before its updates; see `end_step`.

        Args:
            logprobs, ref_logprobs, mask: [B, T].
        Returns:
            ([B, T], 0 at masked positions and wherever the penalty is not a reward; the coefficient)
        """
        self._coef_of_step, self._measured = self.coef, None
        if ref_logprobs is None:
            return torch.zeros_like(logprobs), self._coef_of_step
        kl = kl_estimate(logprobs.detach(), ref_logprobs, self._settings.estimator, mask)
        if self._controller is not None and len(kl) > 0:
            self._measured = float(kl.sum(dim=1).mean()), len(kl)
        weight = self._coef_of_step if self._settings.placement == "reward" else 0.0
        return weight * kl, self._coef_of_step

    def end_step(self) -> None:
        """The controller hears of the KL that the step began with, and so moves the next step's coefficient.

        Only for steps that train the policy. In those that warm the value model up the policy stays where it
        is, which is mostly the reference: the coefficient would shrink with each of them.
        """
        if self._controller is not None and self._measured is not None:
            self._controller.update(*self._measured)
        self._measured = None

    def loss_of_tokens(
        self, logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, mask: torch.Tensor
    ) -> torch.Tensor | None:
        """The term of the loss at each token, [B, T]; None where there is none."""
        if self._settings.placement != "loss" or self._coef_of_step == 0 or ref_logprobs is None:
            return None
        return self._coef_of_step * kl_estimate(logprobs, ref_logprobs, self._settings.estimator, mask)

    def state_dict(self) -> dict[str, float] | None:
        """What a resumed run needs; None with a fixed coefficient."""
        return self._controller.state_dict() if self._controller is not None else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state_dict`."""
        if self._controller is not None and state is not None:
            self._controller.load_state_dict(state)
