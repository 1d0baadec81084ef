"""Proximal policy optimization with a learned value model.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (clipped surrogate, eq. 7; whole loss,
eq. 9), with generalized advantage estimation (Schulman et al. 2016, eq. 16) over response tokens and
the KL to the reference policy as a per-token reward (Ziegler et al. 2019, eq. 2) or in the loss.

Assumes that the value model knows something before the policy listens to it: `value_warmup_steps` gives it
time. Edge case: a response that was cut at the token limit ends its episode there, with value 0 after it.
"""

from __future__ import annotations

from typing import Literal

import torch

from rlhf_dist.algorithms.base import MicroBatch, Stats
from rlhf_dist.algorithms.parts.critic import CriticRecipe, CriticSettings
from rlhf_dist.algorithms.parts.surrogate import ClipSettings, clipped_surrogate


class Settings(CriticSettings, ClipSettings):
    """Settings of `ppo`."""

    name: Literal["ppo"] = "ppo"
    """This recipe."""


class Recipe(CriticRecipe):
    """The `ppo` algorithm."""

    settings: Settings

    def surrogate(self, logprobs: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Stats]:
        return clipped_surrogate(self.settings, logprobs, micro)
