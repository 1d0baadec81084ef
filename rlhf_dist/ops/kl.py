"""Per-token estimates of a KL divergence, and the controller of its coefficient."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.ops.masked import as_bool, check_kind, check_shapes, keep, upcast

KL_KINDS = ("k1", "abs", "k2", "k3")

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 = 4.9e8 keeps its square finite in float32."""

MIN_CONTROLLER_FACTOR = 0.01
"""One update shrinks the coefficient at most a hundredfold: it stays positive, so it can grow again."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """Estimates KL(policy || reference) from tokens sampled by the policy, a number a token.

    With d = logprobs - ref_logprobs (Schulman 2020, "Approximating KL divergence"):

        k1  = d                    unbiased, of either sign
        abs = |d|
        k2  = d^2 / 2              biased, its gradient is unbiased
        k3  = exp(-d) - 1 + d      unbiased, never negative

    In k3, d is clamped to +-20: value and gradient stay finite, and the gradient is 0 outside.

    Args:
        logprobs: [B, T], differentiable.
        ref_logprobs: [B, T], a constant.
        kind: one of `KL_KINDS`.
        mask: [B, T]. Needed where padding may hold NaN or infinity and a gradient is taken.
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
        return 0.5 * d.square()
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ((-d).expm1() + d).clamp(min=0)  # rounding alone can make the sum negative


class AdaptiveKLController:
    """Steers the KL coefficient towards a target KL (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

        coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon)

    The factor is at least `MIN_CONTROLLER_FACTOR`. Without that floor, n_samples >= 5 * horizon at a low
    KL makes the coefficient zero or negative, which is to say a reward for leaving the reference.
    """

    def __init__(self, init_coef: float, target: float, horizon: float) -> None:
        """Raises ValueError unless init_coef >= 0, target > 0 and horizon > 0."""
        if not (init_coef >= 0 and target > 0 and horizon > 0):
            raise ValueError(
                "expected init_coef >= 0, target > 0 and horizon > 0, "
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
        self.coef *= max(1.0 + error * n_samples / self.horizon, MIN_CONTROLLER_FACTOR)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over the coefficient; target and horizon come from the configuration."""
        self.coef = float(state["coef"])
