"""What is done about the gap between the policy that sampled and the policy that the learner starts from.

The gap has two sources: the sampling engine computes other numbers than the learner, and under asynchronous
training it served older weights. With mu the sampler's policy, pi_old the learner's before the step and pi
the learner's now, the surrogate of a token is

    w clip(pi / pi_old) A,   w = importance weight of pi_old / mu     (old_logprobs: learner)
    clip(pi / mu) A                                                   (old_logprobs: rollout)

A KL penalty in the loss and the entropy bonus are added to it, and have no weight.

The first with `tis` or `seq_tis` is decoupled PPO (Hilton et al. 2021, "Batch size-invariance for policy
optimization", arXiv:2110.00641) with a cap: pi_old is the proximal policy, mu the behaviour policy. The
sources of the weights: `ops.losses.importance_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator

from rlhf_dist.ops.losses import importance_weights
from rlhf_dist.ops.masked import masked_mean
from rlhf_dist.settings import Section

TRUNCATING = ("tis", "seq_tis")


class CorrectionSettings(Section):
    """The gap between the policy that sampled and the one that the learner starts a step from."""

    kind: Literal["none", "tis", "seq_tis", "icepop", "seq_icepop", "geo_mask"] = "none"
    """Weights of the tokens: none, ratios truncated at the cap (`tis`), or dropped outside of it (`icepop`);
    `seq_`: one ratio a response; `geo_mask`: responses whose mean ratio is outside are dropped."""
    cap: float | tuple[float, float] = 2.0
    """Largest weight. For the kinds that drop, [lowest, highest], or c for [1/c, c]."""
    old_logprobs: Literal["learner", "rollout"] = Field(default="learner")
    """Whose log-probabilities are the old ones of the ratio: recomputed by the learner (decoupled PPO,
    where weights correct for the sampler), or the sampler's, which puts the gap into the ratio, and into the
    KL from the old policy that is reported: not for `target_kl` nor `ppo_kl`, which go by that KL."""

    @model_validator(mode="after")
    def _cap_fits(self) -> CorrectionSettings:
        if self.kind in TRUNCATING:
            if isinstance(self.cap, tuple) or not self.cap > 0:
                raise ValueError(f"kind={self.kind} truncates at one positive number, not cap={self.cap}")
        elif self.kind != "none":
            low, high = self.cap if isinstance(self.cap, tuple) else (1.0, self.cap)
            if not 0 < low <= high:
                raise ValueError(
                    f"kind={self.kind} keeps what is inside [lowest, highest], or [1/c, c] with c >= 1, "
                    f"not cap={self.cap}"
                )
        if self.kind != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f"old_logprobs=rollout has the sampler in the ratio already; kind={self.kind} would count "
                "it twice: set one of the two back"
            )
        return self


@dataclass(frozen=True)
class Correction:
    """The correction of a step's batch."""

    old_logprobs: torch.Tensor  # [B, T] what ratios are taken to
    weights: torch.Tensor | None  # [B, T], None: all 1
    metrics: dict[str, float]


def correct(
    settings: CorrectionSettings,
    learner_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
) -> Correction:
    """The correction of a whole batch; all tensors [B, T].

    Metrics, where there are weights: their mean, and the share of tokens that were truncated or dropped.
    """
    old = learner_logprobs if settings.old_logprobs == "learner" else rollout_logprobs
    if settings.kind == "none":
        return Correction(old, None, {})
    weights = importance_weights(
        learner_logprobs, rollout_logprobs, mask, kind=settings.kind, cap=settings.cap
    )
    metrics = {"correction_weight_mean": float(masked_mean(weights, mask))}
    if settings.kind in TRUNCATING:
        at_cap = weights >= torch.as_tensor(settings.cap, dtype=weights.dtype)
        metrics["correction_truncated_share"] = float(masked_mean(at_cap, mask))
    else:
        metrics["correction_dropped_share"] = float(masked_mean(weights == 0, mask))
    return Correction(old, weights, metrics)
