"""Losses of the policy on a micro-batch, aggregated as the settings say."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field

from rlhf_dist.algorithms.base import AlgorithmSettings, MicroBatch, Stats
from rlhf_dist.ops.losses import aggregate, mismatch_stats, policy_loss


class ClipSettings(AlgorithmSettings):
    """Of recipes with the clipped surrogate."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound, in multiples of the advantage, on the loss of a bad token whose ratio exploded. None: off."""


def clipped_surrogate(
    settings: ClipSettings, logprobs: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, Stats]:
    """The clipped surrogate of token ratios (Schulman et al. 2017, eq. 7), logprobs [b, T]."""
    return policy_loss(
        logprobs,
        micro.old_logprobs,
        micro.advantages,
        micro.mask,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        weights=micro.weights,
        aggregation=settings.aggregation,
        **denominators(settings, micro),
    )


def plain_surrogate(
    settings: AlgorithmSettings, logprobs: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, Stats]:
    """The surrogate of token ratios without clipping (Schulman et al. 2015, eq. 14), logprobs [b, T]."""
    loss, stats = policy_loss(
        logprobs,
        micro.old_logprobs,
        micro.advantages,
        micro.mask,
        clip_low=1.0,  # the range (0, inf): every ratio
        clip_high=math.inf,
        weights=micro.weights,
        aggregation=settings.aggregation,
        **denominators(settings, micro),
    )
    return loss, {name: value for name, value in stats.items() if "clip" not in name}


def total(settings: AlgorithmSettings, per_token: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
    """This piece's share of a loss given a token at a time, [b, T]."""
    return aggregate(per_token, micro.mask, kind=settings.aggregation, **denominators(settings, micro))


def denominators(settings: AlgorithmSettings, micro: MicroBatch) -> dict[str, Any]:
    """What losses divide by: counts of the whole minibatch, and the constant."""
    return {
        "num_tokens": micro.num_tokens,
        "num_sequences": micro.num_sequences,
        "scale": settings.aggregation_scale,
    }


def shift_stats(logprobs: torch.Tensor, micro: MicroBatch) -> Stats:
    """How far the policy has moved from the old one, for losses that do not say; logprobs [b, T]."""
    moved = mismatch_stats(logprobs, micro.old_logprobs, micro.mask)
    return {
        "approx_kl": moved["kl"],
        "approx_kl_k3": moved["kl_k3"],
        "ratio_mean": moved["weight_mean"],
    }
