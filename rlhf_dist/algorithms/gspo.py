"""Group sequence policy optimization: GRPO's advantages with one ratio a response.

Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv:2507.18071, eq. 5:

    s_i = exp(mean_t log r_t),   L = mean_i -min(s_i A_i, clip(s_i) A_i)

A geometric mean stays close to 1, so the range is thousandths wide, not tenths; a response is clipped as a
whole. By default there is no KL penalty, as in the paper.

Assumes that the reward judges whole responses. Edge case: a group of equal scores has advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from rlhf_dist.algorithms.base import Aggregation, MicroBatch, Stats
from rlhf_dist.algorithms.parts.group import GroupRecipe, GroupSettings
from rlhf_dist.algorithms.parts.kl import NoKLSettings
from rlhf_dist.algorithms.parts.surrogate import denominators
from rlhf_dist.ops.losses import sequence_policy_loss


class Settings(GroupSettings):
    """Settings of `gspo`."""

    name: Literal["gspo"] = "gspo"
    """This recipe."""
    aggregation: Aggregation = "seq_mean_token_mean"
    """From tokens to the loss: the mean of all tokens; or the mean over responses of each one's sum, of
    each one's mean, or of each one's sum over a constant. Counts are the whole minibatch's."""
    clip_low: float = Field(default=3e-4, gt=0, lt=1)
    """The ratio of a response counts down to 1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0)
    """The ratio of a response counts up to 1 + clip_high."""
    kl: NoKLSettings = NoKLSettings()
    """The penalty for leaving the reference policy."""


class Recipe(GroupRecipe):
    """The `gspo` algorithm."""

    settings: Settings

    @property
    def group_kind(self) -> str:
        return "grpo"

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        return sequence_policy_loss(
            logprobs,
            micro.old_logprobs,
            micro.advantages,
            micro.mask,
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            weights=micro.weights,
            aggregation=self.settings.aggregation,
            **denominators(self.settings, micro),
        )
