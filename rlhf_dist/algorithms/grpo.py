"""Group relative policy optimization.

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, eq. 3. For a response i of the g to one prompt:

    A_i = (s_i - mean(s)) / std(s)
    L   = mean_i mean_t [-min(r A, clip(r) A) + kl_coef k3(pi || reference)]

`normalize_std: false` leaves the division out. It makes a prompt on which almost all responses agree count
as much as one on which they differ, whatever the size of the differences.

Assumes that scores of one prompt are comparable. Edge case: a group of equal scores has advantage 0, and
teaches nothing: watch `groups_without_spread`.
"""

from __future__ import annotations

from typing import Literal

from rlhf_dist.algorithms.base import Aggregation
from rlhf_dist.algorithms.parts.group import ClippedGroupRecipe, ClippedGroupSettings
from rlhf_dist.algorithms.parts.kl import LossKLSettings


class Settings(ClippedGroupSettings):
    """Settings of `grpo`."""

    name: Literal["grpo"] = "grpo"
    """This recipe."""
    aggregation: Aggregation = "seq_mean_token_mean"
    """From tokens to the loss: the mean of all tokens; or the mean over responses of each one's sum, of
    each one's mean, or of each one's sum over a constant. Counts are the whole minibatch's."""
    normalize_std: bool = True
    """Divide advantages by the standard deviation of their group's scores."""
    kl: LossKLSettings = LossKLSettings()
    """The penalty for leaving the reference policy."""


class Recipe(ClippedGroupRecipe):
    """The `grpo` algorithm."""

    settings: Settings

    @property
    def group_kind(self) -> str:
        return "grpo" if self.settings.normalize_std else "dr_grpo"
