"""What a step's batch says of the policy that sampled it, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.algorithms.base import StepBatch
from rlhf_dist.engines.step_metrics import token_metrics

MASK = torch.tensor([[True, True], [True, False]])
LEARNER = torch.log(torch.tensor([[0.4, 0.2], [0.1, 1.0]]))
SAMPLER = torch.log(torch.tensor([[0.1, 0.2], [0.1, 1e-9]]))  # learner / sampler: 4, 1, 1
REFERENCE = torch.log(torch.tensor([[0.2, 0.2], [0.1, 1e-9]]))


def metrics(**values):
    fields = {
        "mask": MASK,
        "rollout_logprobs": SAMPLER,
        "old_logprobs": LEARNER,
        "rewards": torch.zeros(2),
        "values": None,
        "ref_logprobs": None,
        "group_ids": torch.arange(2),
    }
    return token_metrics(StepBatch(**(fields | values)), torch.tensor([[1.0, 2.0], [6.0, 99.0]]))


def test_the_gap_is_the_divergence_of_the_sampler_from_the_learner():
    """k3 is rho - 1 - log rho with rho = learner / sampler, k1 is -log rho; the other way k3 is 0.21."""
    found = metrics()
    assert found["rollout_learner_kl"] == pytest.approx((4 - 1 - math.log(4)) / 3, rel=1e-5)
    assert found["rollout_learner_kl_k1"] == pytest.approx(-math.log(4) / 3, rel=1e-5)
    assert found["rollout_learner_gap_max"] == pytest.approx(math.log(4), rel=1e-5)
    assert found["effective_sample_size"] == pytest.approx((6 / 3) ** 2 / (18 / 3), rel=1e-5)
    assert found["entropy"] == pytest.approx(3.0)
    assert "kl_ref" not in found


def test_the_kl_to_the_reference_is_of_the_learners_policy():
    found = metrics(ref_logprobs=REFERENCE)
    assert found["kl_ref"] == pytest.approx(math.log(2) / 3, rel=1e-5)
    assert found["kl_ref_k3"] == pytest.approx((0.5 - 1 + math.log(2)) / 3, rel=1e-5)
    assert found["kl_ref_response"] == pytest.approx(math.log(2) / 2, rel=1e-5)
