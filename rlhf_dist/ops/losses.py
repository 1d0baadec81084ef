"""Losses of policy and value model, and the weights that correct for another sampler.

A loss may be computed in pieces, cut between rows, over micro-batches and over ranks: pass the counts of
the whole minibatch as `num_tokens` and `num_sequences`, and the losses and gradients of the pieces add up
to those of the whole. (A data-parallel engine that averages gradients over ranks divides by their number:
multiply the loss by it.)

Statistics are detached scalars of one piece. All but `*_max` and `*_min` are means over its valid tokens:
combine them weighted by the pieces' token counts. Combine the extremes by max and min; a piece without a
token holds the neutral element. Statistics take no account of `weights`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from rlhf_dist.ops.kl import MAX_LOG_RATIO, kl_estimate
from rlhf_dist.ops.masked import AllReduce, as_bool, check_kind, check_shapes, keep, masked_mean

AGGREGATIONS = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm")
WEIGHT_KINDS = ("none", "tis", "seq_tis", "icepop", "seq_icepop", "geo_mask")
REJECTION_KINDS = ("k1", "k2", "k3")
REJECTION_LEVELS = ("token", "seq_sum", "seq_mean", "seq_max")

Stats: TypeAlias = dict[str, Tensor]
Count: TypeAlias = "Tensor | float | None"
Bounds: TypeAlias = float | tuple[float, float]


def aggregate(
    per_token_loss: Tensor,
    mask: Tensor,
    *,
    kind: str,
    num_tokens: Count = None,
    num_sequences: Count = None,
    scale: float | None = None,
) -> Tensor:
    """One number from a loss a token. With N = `num_tokens`, S = `num_sequences`, n_i = sum_t k_it:

        token_mean               sum_it k L / N                (Yu et al. 2025, arXiv:2503.14476, sec. 3.3)
        seq_mean_token_sum       sum_i (sum_t k L) / S
        seq_mean_token_mean      sum_i (sum_t k L / n_i) / S   (Shao et al. 2024, arXiv:2402.03300, eq. 3)
        seq_mean_token_sum_norm  sum_i (sum_t k L) / (S scale) (Liu et al. 2025, arXiv:2503.20783, sec. 3.2)

    Args:
        per_token_loss: [B, T].
        mask: [B, T].
        kind: one of `AGGREGATIONS`.
        num_tokens: N, at least 1; default the valid tokens of this batch. Pass that of the whole where
            this is a piece.
        num_sequences: S, at least 1; default the rows of this batch with a valid token. As above.
        scale: the constant of the last kind; default T, the padded width, which differs between pieces.
    Returns:
        A scalar; for an empty batch 0 with gradient 0, attached to the graph.
    Raises:
        ValueError: shapes differ or are not [B, T], the kind is unknown, or the scale is not positive.
    """
    check_kind(kind, AGGREGATIONS)
    check_shapes(ndim=2, per_token_loss=per_token_loss, mask=mask)
    if scale is not None and not scale > 0:
        raise ValueError(f"expected a positive scale, received {scale}")
    mask = as_bool(mask)
    loss = keep(per_token_loss, mask)
    lengths = mask.sum(-1)  # (B,)
    if kind == "token_mean":
        return loss.sum() / _at_least_one(num_tokens, lengths.sum())
    num_sequences = _at_least_one(num_sequences, (lengths > 0).sum())
    if kind == "seq_mean_token_mean":
        return (loss.sum(-1) / lengths.clamp(min=1)).sum() / num_sequences
    if kind == "seq_mean_token_sum_norm":
        loss = loss / (scale if scale is not None else max(mask.shape[1], 1))
    return loss.sum() / num_sequences


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    aggregation: str = "token_mean",
    num_tokens: Count = None,
    num_sequences: Count = None,
    scale: float | None = None,
) -> tuple[Tensor, Stats]:
    """The clipped surrogate objective (Schulman et al. 2017, arXiv:1707.06347, eq. 7), to be minimised.

        r_t = exp(logprobs - old_logprobs)
        L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        L_t = min(L_t, -dual_clip A_t) where A_t < 0   (Ye et al. 2020, arXiv:1912.09729, dual-clip PPO)

    The log-ratio is clamped to +-20, with gradient 0 outside, so that no ratio overflows. Where
    old_logprobs equals logprobs, the gradient is that of REINFORCE, -A_t.

    Args:
        logprobs: [B, T], differentiable. All other tensors are constants.
        old_logprobs: [B, T].
        advantages: [B, T].
        mask: [B, T].
        clip_low: the ratio's room below 1.
        clip_high: the ratio's room above 1.
        dual_clip: the cap on the ratio at negative advantages, above 1. None: no cap.
        weights: [B, T], multiply L_t: see `importance_weights`.
        aggregation, num_tokens, num_sequences, scale: see `aggregate`.
    Returns:
        (loss, stats), see the module for how to combine stats:
        clip_fraction: clipping changes the objective (before dual clip); `_low` of it at the lower
            bound (A < 0), `_high` at the upper (A > 0);
        dual_clip_fraction: the cap of dual clip acts;
        approx_kl, approx_kl_k3: the estimates k1 and k3 of KL(old || new), of the clamped log-ratio;
        ratio_mean, ratio_max, ratio_min.
    Raises:
        ValueError: shapes differ or are not [B, T], the aggregation is unknown, or dual_clip <= 1.
    """
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    loss, stats = _clipped_surrogate(
        log_ratio,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
    )
    total = aggregate(
        loss, mask, kind=aggregation, num_tokens=num_tokens, num_sequences=num_sequences, scale=scale
    )
    return total, stats | _policy_shift(log_ratio, mask)


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
    aggregation: str = "seq_mean_token_mean",
    num_tokens: Count = None,
    num_sequences: Count = None,
    scale: float | None = None,
) -> tuple[Tensor, Stats]:
    """GSPO: the clipped surrogate of a ratio a sequence (Zheng et al. 2025, arXiv:2507.18071).

        s_i  = exp(mean_t (logprobs - old_logprobs))                            (eq. 7)
        s_it = sg[s_i] p_it / sg[p_it]   with value s_i and gradient of token t (eq. 14)
        L_it = -min(s_it A_it, clip(s_it, 1 - clip_low, 1 + clip_high) A_it)    (eq. 13)

    With one advantage a sequence, value and gradient are those of eq. 5. log s_i is clamped to +-20,
    with gradient 0 outside.

    Args, Returns, Raises: as `policy_loss`; the `ratio_*` and `clip_*` stats are of s_it, the KL
    estimates of single tokens.
    """
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    mean = log_ratio.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    own = torch.where(log_ratio.isfinite(), log_ratio, 0.0)
    log_sequence_ratio = keep(mean + (own - own.detach()), mask)  # (B, T)
    loss, stats = _clipped_surrogate(
        log_sequence_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, weights=weights
    )
    total = aggregate(
        loss, mask, kind=aggregation, num_tokens=num_tokens, num_sequences=num_sequences, scale=scale
    )
    return total, stats | _policy_shift(log_ratio, mask)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
    aggregation: str = "token_mean",
    num_tokens: Count = None,
    num_sequences: Count = None,
    scale: float | None = None,
) -> tuple[Tensor, Stats]:
    """Squared error of the values, clipped around the old ones (OpenAI Baselines; Engstrom et al. 2020,
    arXiv:2005.12729, sec. 3).

        L_t = max((V_t - R_t)^2, (clip(V_t, V_old - clip, V_old + clip) - R_t)^2) / 2

    Args:
        values: [B, T], differentiable. All other tensors are constants.
        old_values: [B, T].
        returns: [B, T].
        mask: [B, T].
        clip: how far a value may move at a gain. None: the plain squared error.
        aggregation, num_tokens, num_sequences, scale: see `aggregate`.
    Returns:
        (loss, stats), see the module for how to combine stats:
        clip_fraction: the clipped term is the larger;
        value_mean, return_mean, return_sq_mean, error_mean (of R - V), error_sq_mean.
        Explained variance, after combination: 1 - (error_sq_mean - error_mean^2)
        / (return_sq_mean - return_mean^2).
    Raises:
        ValueError: shapes differ or are not [B, T], the aggregation is unknown, or clip is negative.
    """
    check_shapes(ndim=2, values=values, old_values=old_values, returns=returns, mask=mask)
    if clip is not None and not clip >= 0:
        raise ValueError(f"expected clip >= 0, received {clip}")
    mask = as_bool(mask)
    values, old_values, returns = (
        keep(values, mask),
        keep(old_values.detach(), mask),
        keep(returns.detach(), mask),
    )
    squared = (values - returns).square()
    loss, clipped = squared, torch.zeros_like(mask)
    if clip is not None:
        near = torch.clamp(values, old_values - clip, old_values + clip)
        squared_near = (near - returns).square()
        clipped = squared_near > squared
        loss = torch.where(clipped, squared_near, squared)
    total = aggregate(
        0.5 * loss, mask, kind=aggregation, num_tokens=num_tokens, num_sequences=num_sequences, scale=scale
    )
    return total, {
        "clip_fraction": masked_mean(clipped.to(values.dtype), mask),
        "value_mean": masked_mean(values.detach(), mask),
        "return_mean": masked_mean(returns, mask),
        "return_sq_mean": masked_mean(returns.square(), mask),
        "error_mean": masked_mean(returns - values.detach(), mask),
        "error_sq_mean": masked_mean(squared.detach(), mask),
    }


@torch.no_grad()
def importance_weights(
    train_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    kind: str,
    cap: Bounds | None = None,
) -> Tensor:
    """Weights that make tokens of the rollout engine count as tokens of the trainer's policy.

    With d = train_logprobs - rollout_logprobs and rho = exp(d), d clamped to +-20:

        none        1
        tis         min(rho, cap)                                       (Ionides 2008; Yao et al. 2025)
        seq_tis     min(R, cap)                                         (Liu, Li et al. 2025)
        icepop      rho where lo <= rho <= hi, else 0                   (Ling team 2025)
        seq_icepop  R where lo <= R <= hi, else 0                       (icepop, at the level of seq_tis)
        geo_mask    rho where lo <= exp(mean_t d) <= hi, else 0         (Liu, Li et al. 2025; OpenRLHF)

    with R = exp(sum_t d) of the row, the sum clamped to +-20 instead of d. R and the geometric mean
    exp(mean_t d) are the same at each token of a row.

    Ionides 2008, "Truncated importance sampling"; Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", who apply it to the gap between engines; Ling team 2025, "Every Step
    Evolves", arXiv:2510.18855, which has IcePop; Liu, Li et al. 2025, "When Speed Kills Stability", with
    weights and masks of whole responses, whose equations verl's documentation of its rollout correction has
    too. They reject by the geometric mean and leave it at that; that the rows kept have weights, uncapped
    ones, is as in OpenRLHF (`seq-mask-tis`).

    A dropped token still counts in the loss's denominator. At a valid token an infinite d counts as +-20 in
    rho, and as infinite in the sum and the mean of its row. Where d is NaN, or the sum of a row that has
    infinities of both signs, there is no weight: it is NaN in `tis` and `seq_tis`; the others drop it.

    Args:
        train_logprobs: [B, T], of the trainer under the weights that sampled.
        rollout_logprobs: [B, T], as the rollout engine reported them.
        mask: [B, T].
        kind: one of `WEIGHT_KINDS`.
        cap: for `tis` and `seq_tis` a number; for the rest (lo, hi), or one number c for (1/c, c).
    Returns:
        [B, T], without gradient, 0 at masked positions.
    Raises:
        ValueError: shapes differ or are not [B, T], the kind is unknown, or the cap does not fit it.
    """
    check_kind(kind, WEIGHT_KINDS)
    log_ratio, mask = _log_ratio(train_logprobs, rollout_logprobs, mask)
    if kind == "none":
        return keep(torch.ones_like(log_ratio), mask)
    if kind in ("seq_tis", "seq_icepop"):
        log_weights = log_ratio.sum(-1, keepdim=True).expand_as(mask)
    else:
        log_weights = log_ratio
    weights = keep(log_weights.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), mask)
    if kind in ("tis", "seq_tis"):
        highest = _number(cap)
        if highest is None or not highest > 0:
            raise ValueError(f"{kind} expects one positive number as its cap, received {cap!r}")
        return weights.clamp(max=highest)
    low, high = _bounds(kind, cap)
    if kind == "geo_mask":
        mean = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
        return keep(weights, (mean >= low) & (mean <= high))
    return keep(weights, (weights >= low) & (weights <= high))


@torch.no_grad()
def rejection_mask(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, kind: str, level: str, bounds: Bounds
) -> Tensor:
    """The mask without the tokens or rows on which trainer and rollout engine disagree too much.

    Rejection as in Liu, Li et al. 2025, "When Speed Kills Stability", and in verl's documentation of its
    rollout correction. With d = train_logprobs - rollout_logprobs clamped to +-20, and a value of each token,

        k1  v_t = d_t                    k2  v_t = d_t^2 / 2           k3  v_t = exp(d_t) - 1 - d_t

    a token or row is kept where lo <= exp(x) <= hi for k1, and where x <= hi for k2 and k3, with

        token     x = v_t
        seq_sum   x = sum_t v_t          for k1 the bounds are on the product of the row's ratios
        seq_mean  x = sum_t v_t / n      for k1 on their geometric mean
        seq_max   x = v_t                and the row is kept if all its tokens are

    k2 and k3 are the estimates of KL(rollout || train) of Schulman 2020, "Approximating KL divergence".
    Unlike a weight of 0, a rejected token leaves the loss's denominator. An infinite d counts as +-20, at
    every level; a token or row with NaN is rejected.

    Args:
        train_logprobs, rollout_logprobs, mask: [B, T], as in `importance_weights`.
        kind: one of `REJECTION_KINDS`.
        level: one of `REJECTION_LEVELS`.
        bounds: for k1 (lo, hi) of the weight, or one number c for (1/c, c); for k2 and k3 the number hi.
    Returns:
        [B, T], bool.
    Raises:
        ValueError: shapes differ or are not [B, T], a name is unknown, or the bounds do not fit the kind.
    """
    check_kind(kind, REJECTION_KINDS)
    check_kind(level, REJECTION_LEVELS)
    log_ratio, mask = _log_ratio(train_logprobs, rollout_logprobs, mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        low, high = (math.log(bound) if bound > 0 else -math.inf for bound in _bounds(kind, bounds))
        value = log_ratio
    elif (highest := _number(bounds)) is not None and highest > 0:
        low, high = -math.inf, highest
        value = kl_estimate(-log_ratio, torch.zeros_like(log_ratio), kind)
    else:
        raise ValueError(f"{kind} expects one positive number as its bound, received {bounds!r}")
    if level in ("seq_sum", "seq_mean"):
        value = value.sum(-1, keepdim=True)
    if level == "seq_mean":
        value = value / mask.sum(-1, keepdim=True).clamp(min=1)
    kept = (value >= low) & (value <= high)
    if level == "seq_max":
        kept = (kept | ~mask).all(-1, keepdim=True)
    return mask & kept


@torch.no_grad()
def mismatch_stats(train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Stats:
    """How far the rollout engine's log-probabilities are from the trainer's, over tokens it sampled.

    The estimates of Schulman 2020, "Approximating KL divergence", and the sample size of Kish 1965, "Survey
    Sampling"; verl's documentation of its rollout correction has the same metrics. With
    d = train_logprobs - rollout_logprobs and rho = exp(d), d clamped to +-20:

        kl         mean(-d)               k1 of KL(rollout || train)
        kl_k3      mean(rho - 1 - d)      k3 of it
        abs_max    max |d|
        weight_mean, weight_sq_mean       mean(rho), mean(rho^2); the latter minus 1 is the chi-square
        ess        mean(rho)^2 / mean(rho^2), see `effective_sample_size`

    `ess` is not a mean: take it anew from the combined weight_mean and weight_sq_mean. A NaN at a valid token
    makes everything NaN, but ess 0.

    Args:
        train_logprobs, rollout_logprobs, mask: [B, T].
    Returns:
        Detached scalars.
    Raises:
        ValueError: shapes differ or are not [B, T].
    """
    log_ratio, mask = _log_ratio(train_logprobs, rollout_logprobs, mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    return {
        "kl": masked_mean(-log_ratio, mask),
        "kl_k3": masked_mean(kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3"), mask),
        "abs_max": _extreme(log_ratio.abs(), mask, largest=True, neutral=0.0),
        "weight_mean": masked_mean(ratio, mask),
        "weight_sq_mean": masked_mean(ratio.square(), mask),
        "ess": effective_sample_size(ratio, mask),
    }


def effective_sample_size(weights: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> Tensor:
    """Share of the tokens that would carry as much information unweighted (Kish 1965).

        ess = mean(w)^2 / mean(w^2)   in [1/N, 1],   0 where all weights are 0 or no token is valid

    Args:
        weights: any shape, not negative.
        mask: the shape of `weights`.
        all_reduce: sums a tensor over the ranks. None: this batch alone.
    Returns:
        A scalar.
    Raises:
        ValueError: shapes differ.
    """
    check_shapes(weights=weights, mask=mask)
    weights = keep(weights, as_bool(mask))
    if all_reduce is None:
        largest = weights.amax() if weights.numel() else weights.new_ones(())
        weights = weights / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    mean = masked_mean(weights, mask, all_reduce=all_reduce)
    mean_square = masked_mean(weights.square(), mask, all_reduce=all_reduce)
    return torch.where(mean_square > 0, mean.square() / mean_square, 0.0)


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(logprobs - old_logprobs, 0 at masked positions; the mask as bool), both [B, T]."""
    check_shapes(ndim=2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    mask = as_bool(mask)
    return keep(logprobs, mask) - keep(old_logprobs.detach(), mask), mask


def _clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """(L_t of `policy_loss` as [B, T], its ratio and clip statistics)."""
    check_shapes(advantages=advantages, mask=mask)
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"expected clip_low >= 0 and clip_high >= 0, received {clip_low=}, {clip_high=}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip > 1, received {dual_clip}")
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = keep(advantages.detach(), mask)
    free = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    clipped = bounded > free
    loss = torch.where(clipped, bounded, free)
    capped = torch.zeros_like(mask)
    if dual_clip is not None:
        cap = -dual_clip * advantages
        capped = (advantages < 0) & (loss > cap)
        loss = torch.where(capped, cap, loss)
    if weights is not None:
        check_shapes(weights=weights, mask=mask)
        loss = loss * keep(weights.detach(), mask)
    ratio = ratio.detach()
    return loss, {
        "clip_fraction": masked_mean(clipped.to(ratio.dtype), mask),
        "clip_fraction_low": masked_mean((clipped & (advantages < 0)).to(ratio.dtype), mask),
        "clip_fraction_high": masked_mean((clipped & (advantages > 0)).to(ratio.dtype), mask),
        "dual_clip_fraction": masked_mean(capped.to(ratio.dtype), mask),
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": _extreme(ratio, mask, largest=True, neutral=math.exp(-MAX_LOG_RATIO)),
        "ratio_min": _extreme(ratio, mask, largest=False, neutral=math.exp(MAX_LOG_RATIO)),
    }


@torch.no_grad()
def _policy_shift(log_ratio: Tensor, mask: Tensor) -> Stats:
    """Estimates of KL(old || new) over tokens that the old policy sampled."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "approx_kl": masked_mean(-log_ratio, mask),
        "approx_kl_k3": masked_mean(kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3"), mask),
    }


def _extreme(x: Tensor, mask: Tensor, *, largest: bool, neutral: float) -> Tensor:
    """The largest or smallest x at a valid token, `neutral` without one."""
    candidates = torch.cat([torch.where(mask, x, neutral).flatten(), x.new_full((1,), neutral)])
    return candidates.amax() if largest else candidates.amin()


def _at_least_one(count: Count, default: Tensor) -> Tensor | float:
    if count is None:
        return default.clamp(min=1)
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _bounds(kind: str, bounds: Bounds | None) -> tuple[float, float]:
    one = _number(bounds)
    if one is not None and one >= 1:
        return 1 / one, one
    if one is None and isinstance(bounds, Iterable):
        two = [number for each in bounds if (number := _number(each)) is not None]
        if len(two) == 2 and 0 <= two[0] <= two[1] and two[1] > 0:
            return two[0], two[1]
    raise ValueError(
        f"{kind} expects (lo, hi) with 0 <= lo <= hi and hi > 0, or one number >= 1, received {bounds!r}"
    )


def _number(value: object) -> float | None:
    """A float from any kind of number, scalars of tensor libraries included; None: it is none."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
