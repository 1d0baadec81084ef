"""GRPO done right: without the two divisions that favour easy prompts and long wrong responses.

Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.2:

    A_i = s_i - mean(s)
    L   = mean_i sum_t [-min(r A, clip(r) A)] / constant

The constant (`aggregation_scale`) only scales the loss; it must not depend on the responses. By default there
is no KL penalty, as in the paper.

Assumes that scores of all prompts have one scale. Edge case: a group of equal scores has advantage 0.
"""

from __future__ import annotations

from typing import Literal

from rlhf_dist.algorithms.base import Aggregation
from rlhf_dist.algorithms.parts.group import ClippedGroupRecipe, ClippedGroupSettings
from rlhf_dist.algorithms.parts.kl import NoKLSettings


class Settings(ClippedGroupSettings):
    """Settings of `dr_grpo`."""

    name: Literal["dr_grpo"] = "dr_grpo"
    """This recipe."""
    aggregation: Aggregation = "seq_mean_token_sum_norm"
    """From tokens to the loss: the mean of all tokens; or the mean over responses of each one's sum, of
    each one's mean, or of each one's sum over a constant. Counts are the whole minibatch's."""
    kl: NoKLSettings = NoKLSettings()
    """The penalty for leaving the reference policy."""


class Recipe(ClippedGroupRecipe):
    """The `dr_grpo` algorithm."""

    settings: Settings

    @property
    def group_kind(self) -> str:
        return "dr_grpo"
