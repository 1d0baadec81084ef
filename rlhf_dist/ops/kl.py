"""Per-token estimates of a KL divergence, and the controller of its coefficient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_dist.ops.masked import as_bool, check_kind, check_shapes, keep, upcast

KL_KINDS = ("k1", "abs", "k2", "k3")

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 = 4.9e8 keeps its square finite in float32."""

MIN_CONTROLLER_FACTOR = 1e-3
"""Of one update at least: the formula gives less, or a negative factor, from 4.995 horizons of samples on."""
CONTROLLER_RANGE = 1e-30, 1e6
"""An update leads no further than to these coefficients: from 0 there were no way back, and the largest KL
estimate of a token, e^20, times the larger one is finite in float32."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """Estimates KL(policy || reference) from tokens sampled by the policy, a number a token.

    With d = logprobs - ref_logprobs (Schulman 2020, "Approximating KL divergence"):

        k1  = d                    unbiased, of either sign
        abs = |d|
        k2  = d^2 / 2              biased, its gradient is unbiased
        k3  = exp(-d) - 1 + d      unbiased, never negative

    In k3, d is clamped to +-20: value and gradient stay finite, and the gradient is 0 outside.

    Where d is infinite, the value is the formula's, but in k3, which is finite; where d is NaN, it is NaN.
    The gradient there is 0 in k2 and k3; in k1 and abs it is that of the formula, 1 and the sign (of NaN 0).

    Args:
        logprobs: [B, T], differentiable.
        ref_logprobs: [B, T], a constant.
        kind: one of `KL_KINDS`.
        mask: [B, T]. None: the caller masks the result; where it gives a token no weight, the gradient is 0
            whatever the token holds.
    Returns:
        [B, T], 0 at masked positions.
    Raises:
        ValueError: shapes differ, or the kind is unknown.
    """
    check_kind(kind, KL_KINDS)
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    logprobs, ref_logprobs = upcast(logprobs), upcast(ref_logprobs.detach())
    if mask is not None:
        check_shapes(logprobs=logprobs, mask=mask)
        mask = as_bool(mask)
        logprobs, ref_logprobs = keep(logprobs, mask), keep(ref_logprobs, mask)
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        finite = d.isfinite()
        return torch.where(finite, 0.5 * torch.where(finite, d, 0.0).square(), d.detach().square())
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ((-d).expm1() + d).clamp(min=0)  # rounding alone can make the sum negative


class AdaptiveKLController:
    """Steers the KL coefficient towards a target KL (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

        coef <- coef * max(1e-3, 1 + clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon)

    bounded to [1e-30, 1e6]; a coefficient that began outside is led no further out. So the coefficient stays
    finite and, unless it began at 0, positive, and a larger KL never gives a smaller one. The source has no
    bounds: there a low KL over 5 horizons of samples or more makes the factor 0 or negative, and so rewards
    leaving the reference.
    """

    def __init__(self, init_coef: float, target: float, horizon: float) -> None:
        """Raises ValueError unless init_coef >= 0 and finite, target > 0 and horizon > 0."""
        if not (0 <= init_coef < math.inf and target > 0 and horizon > 0):
            raise ValueError(
                "expected a finite init_coef >= 0, target > 0 and horizon > 0, "
                f"received {init_coef=}, {target=}, {horizon=}"
            )
        self.coef = float(init_coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, n_samples: int) -> None:
        """Takes in the mean KL of `n_samples` new samples; raises ValueError for NaN."""
        error = min(max(float(kl) / self.target - 1.0, -0.2), 0.2)
        if error != error:
            raise ValueError(f"expected a KL that is a number, received {kl=}")
        factor = max(1.0 + error * float(n_samples) / self.horizon, MIN_CONTROLLER_FACTOR)
        lowest, highest = min(CONTROLLER_RANGE[0], self.coef), max(CONTROLLER_RANGE[1], self.coef)
        self.coef = min(max(self.coef * factor, lowest), highest)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over the coefficient; target and horizon come from the configuration.

        Raises:
            ValueError: it is negative, infinite or not a number.
        """
        coef = float(state["coef"])
        if not 0 <= coef < math.inf:
            raise ValueError(f"expected a finite coefficient >= 0, received {coef}")
        self.coef = coef
