"""Batches of the recipes' examples: five responses to two prompts, of lengths 3, 2, 1, 2, 3."""

from __future__ import annotations

import pytest
import torch

from rlhf_dist.algorithms import make_algorithm, settings_class
from rlhf_dist.algorithms.base import MicroBatch, StepBatch

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)


@pytest.fixture
def recipe():
    """A recipe by name, with settings."""

    def make(name, **values):
        return make_algorithm(settings_class(name).model_validate(values))

    return make


@pytest.fixture
def step_batch():
    """Scores 1, 2, 6 of prompt 7 and 5, 5 of prompt 3; every policy has the same log-probabilities."""

    def make(**values):
        fields = {
            "mask": MASK,
            "rollout_logprobs": torch.zeros(MASK.shape),
            "old_logprobs": torch.zeros(MASK.shape),
            "rewards": torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0]),
            "values": None,
            "ref_logprobs": None,
            "group_ids": torch.tensor([7, 7, 7, 3, 3]),
        }
        return StepBatch(**(fields | values))

    return make


@pytest.fixture
def micro_batch():
    """A minibatch in one piece."""

    def make(**values):
        mask = values.get("mask", MASK)
        fields = {
            "mask": mask,
            "old_logprobs": torch.zeros(mask.shape),
            "advantages": torch.ones(mask.shape),
            "old_values": None,
            "returns": None,
            "num_tokens": int(mask.sum()),
            "num_sequences": int(mask.any(1).sum()),
        }
        return MicroBatch(**(fields | values))

    return make
