"""Recipes that judge a response by the other responses to its prompt, without a value model.

The tokens of a response share one advantage. A KL penalty in the reward is taken off the score of the whole
response, before the comparison.
"""

from __future__ import annotations

import torch
from pydantic import Field

from rlhf_dist.algorithms.base import AlgorithmSettings, Estimates, MicroBatch, Stats, StepBatch
from rlhf_dist.algorithms.parts.recipe import PolicyRecipe, spread_of
from rlhf_dist.algorithms.parts.surrogate import ClipSettings, clipped_surrogate
from rlhf_dist.ops.masked import keep
from rlhf_dist.ops.returns import group_advantages


class GroupSettings(AlgorithmSettings):
    """Of recipes that compare the responses to a prompt."""

    num_epochs: int = Field(default=1, ge=1, le=64)
    """Passes over each batch of experience. The first is on-policy, the others are not."""

    @property
    def min_samples_per_prompt(self) -> int:
        return 2


class GroupRecipe(PolicyRecipe):
    """The clipped surrogate of group advantages; a subclass says which."""

    settings: GroupSettings

    @property
    def group_kind(self) -> str:
        """The comparison: one of `ops.returns.GROUP_KINDS`."""
        raise NotImplementedError

    def estimate(self, batch: StepBatch) -> tuple[Estimates, dict[str, float]]:
        penalty, coef = self._kl.begin_step(batch.old_logprobs, batch.ref_logprobs, batch.mask)
        scores = batch.rewards - penalty.sum(dim=1)  # [B]
        of_samples = group_advantages(scores, batch.group_ids, kind=self.group_kind)  # [B]
        advantages = keep(of_samples.unsqueeze(1), batch.mask)  # [B, T]
        metrics = {
            "kl_coef": coef,
            "advantage_std": spread_of(advantages, batch.mask),
            "groups_without_spread": _share_without_spread(of_samples, batch.group_ids),
        }
        return Estimates(advantages, None), metrics


class ClippedGroupSettings(GroupSettings, ClipSettings):
    """Of group recipes with token ratios."""


class ClippedGroupRecipe(GroupRecipe):
    """Group advantages in the clipped surrogate of token ratios."""

    settings: ClippedGroupSettings

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        return clipped_surrogate(self.settings, logprobs, micro)


def _share_without_spread(advantages: torch.Tensor, group_ids: torch.Tensor) -> float:
    """Groups in which no response is better than another, and so nothing is learned; both [B]."""
    num_groups = len(group_ids.unique())
    return 1 - len(group_ids[advantages != 0].unique()) / max(num_groups, 1)
