"""REINFORCE leave-one-out.

Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740, eq. 7. For a response i of the g to one prompt:

    A_i = s_i - mean of the other s_j,   s = score - kl_coef sum_t kl_t
    L   = -A_i sum_t log pi(token t)

The whole response is one action: hence the sum over its tokens, and a KL of whole responses in the score.
The baseline does not hold the sample itself, so that the gradient is unbiased.

Assumes that responses to a prompt are independent. A step's first update has the gradient of L; the ratio
clipped a token at a time serves the later ones. Edge case: a group of equal scores has advantage 0.
"""

from __future__ import annotations

from typing import Literal

from rlhf_dist.algorithms.base import Aggregation
from rlhf_dist.algorithms.parts.group import ClippedGroupRecipe, ClippedGroupSettings


class Settings(ClippedGroupSettings):
    """Settings of `rloo`."""

    name: Literal["rloo"] = "rloo"
    """This recipe."""
    aggregation: Aggregation = "seq_mean_token_sum"
    """From tokens to the loss: the mean of all tokens; or the mean over responses of each one's sum, of
    each one's mean, or of each one's sum over a constant. Counts are the whole minibatch's."""


class Recipe(ClippedGroupRecipe):
    """The `rloo` algorithm."""

    settings: Settings

    @property
    def group_kind(self) -> str:
        return "rloo"
