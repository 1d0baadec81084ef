"""From scores to advantages: reward shaping, generalised advantage estimation, group baselines."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.ops.masked import as_bool, check_kind, check_shapes, keep, last_valid, upcast

GROUP_KINDS = ("rloo", "grpo", "dr_grpo", "reinforce_baseline")

GRPO_EPS = 1e-6
"""Added to the standard deviation of a group."""


@torch.no_grad()
def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The score at the last chosen token, minus the KL penalty at every one.

        r_t = score * [t is the last valid token] - kl_coef * kl_t
        (Ouyang et al. 2022, arXiv:2203.02155, eq. 2; a token at a time as in Ziegler et al. 2019)

    Args:
        scores: [B], of whole sequences.
        kl: [B, T].
        mask: [B, T]. The score of a row without a valid token is dropped.
        kl_coef: the coefficient.
    Returns:
        [B, T], without gradient.
    Raises:
        ValueError: shapes differ, or `scores` is not [B].
    """
    check_shapes(ndim=2, kl=kl, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"expected scores of [B], received {tuple(scores.shape)}, mask {tuple(mask.shape)}")
    penalty = kl_coef * keep(kl, as_bool(mask))
    return keep(scores.unsqueeze(-1), last_valid(mask)) - penalty


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma V_next - V_t
        A_t = delta_t + gamma lam A_next,   return_t = A_t + V_t

    "next" is the next valid token: masked positions are neither discounted through nor counted, and a
    reward that sits on one is dropped. After the last valid token V and A are 0.

    Args:
        rewards: [B, T].
        values: [B, T], V before token t.
        mask: [B, T].
        gamma: discount.
        lam: weight of the longer estimates.
    Returns:
        (advantages, returns), both [B, T], without gradient, 0 at masked positions.
    Raises:
        ValueError: shapes differ or are not [B, T].
    """
    check_shapes(ndim=2, rewards=rewards, values=values, mask=mask)
    mask = as_bool(mask)
    rewards, values = keep(rewards, mask), keep(values, mask)
    carried = values.new_zeros(len(values))  # (B,) A_next
    next_value = torch.zeros_like(carried)  # (B,)
    steps = []
    for reward, value, valid in zip(
        reversed(rewards.unbind(1)), reversed(values.unbind(1)), reversed(mask.unbind(1)), strict=True
    ):
        advantage = reward + gamma * next_value - value + gamma * lam * carried
        carried = torch.where(valid, advantage, carried)
        next_value = torch.where(valid, value, next_value)
        steps.append(carried)
    advantages = keep(torch.stack(steps[::-1], dim=1) if steps else values, mask)
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return-to-go for a policy gradient without a value model (Williams 1992, REINFORCE).

        G_t = r_t + gamma G_next

    "next" is the next valid token, as in `gae`, of which this is the case V = 0, lam = 1.

    Args:
        rewards: [B, T].
        mask: [B, T].
        gamma: discount.
    Returns:
        [B, T], without gradient, 0 at masked positions.
    Raises:
        ValueError: shapes differ or are not [B, T].
    """
    check_shapes(ndim=2, rewards=rewards, mask=mask)
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


@torch.no_grad()
def group_advantages(scores: Tensor, group_ids: Tensor, *, kind: str) -> Tensor:
    """Advantage of each sequence over the other answers to its prompt.

    With g the size of the group, m its mean, sd its standard deviation (Bessel):

        rloo                A = (s - m) g / (g - 1), s minus the mean of the others
                            (Ahmadian et al. 2024, arXiv:2402.14740)
        grpo                A = (s - m) / (sd + 1e-6)   (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2)
        dr_grpo             A = s - m                   (Liu et al. 2025, arXiv:2503.20783, sec. 3.2)
        reinforce_baseline  A = s - m, which the caller spreads over the tokens and whitens over the
                            batch with `masked_whiten`  (Hu et al. 2025, arXiv:2501.03262)

    The mean of the deviations, which is the rounding error of the first mean, is taken off again, as in
    `masked_whiten`: scores may be large against their spread. A group of one and a group of equal scores get
    exactly 0. Equality is tested on the scores: rounding may leave a little of a spread, and a division by it
    makes that large.

    Args:
        scores: [B].
        group_ids: [B], integers; rows of a group need not be neighbours.
        kind: one of `GROUP_KINDS`.
    Returns:
        [B], without gradient.
    Raises:
        ValueError: shapes differ or are not [B], or the kind is unknown.
    """
    check_kind(kind, GROUP_KINDS)
    check_shapes(ndim=1, scores=scores, group_ids=group_ids)
    scores = upcast(scores)
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    zeros = scores.new_zeros(len(sizes))  # (groups,)

    mean = zeros.index_add(0, group, scores) / sizes
    deviation = scores - mean[group]  # (B,)
    deviation = deviation - (zeros.index_add(0, group, deviation) / sizes)[group]
    lowest = zeros.scatter_reduce(0, group, scores, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, scores, "amax", include_self=False)
    deviation = torch.where((lowest == highest)[group], 0.0, deviation)

    others = (sizes - 1).clamp(min=1)
    if kind == "rloo":
        return deviation * (sizes.to(scores.dtype) / others)[group]
    if kind == "grpo":
        spread = (zeros.index_add(0, group, deviation.square()) / others).sqrt()
        return deviation / (spread + GRPO_EPS)[group]
    return deviation
