"""The trust-region step of a small policy against dense linear algebra: the Fisher matrix written out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_dist.algorithms import make_algorithm, settings_class
from rlhf_dist.algorithms.base import Estimates, StepBatch, TrustRegion
from rlhf_dist.algorithms.parts.correction import Correction
from rlhf_dist.engines.pieces import StepData
from rlhf_dist.engines.trust_region import BatchObjective, trust_region_step
from rlhf_dist.errors import ModelError
from rlhf_dist.experience.samples import Samples

PROMPTS = [[1, 2], [3], [0, 4, 1]]
RESPONSES = [[2, 0, 3], [1], [4, 4]]
MASK = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)  # the 0 inside was not chosen
NUM_TOKENS = 5
ADVANTAGES = torch.tensor([[1.5, 0, -0.5], [-2.0, 0, 0], [0.7, 0.3, 0]], dtype=torch.float64)
TEMPERATURE = 0.7
ONE_PIECE, TWO_PIECES = [[[0, 1, 2]]], [[[2], [0, 1]]]


class TinyPolicy(nn.Module):
    """p(next token | token): 20 parameters, of which none is redundant in itself."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(5, 2, generator=generator, dtype=torch.float64))
        self.outer = nn.Parameter(torch.randn(2, 5, generator=generator, dtype=torch.float64))

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.inner[input_ids[:, logits_to_keep]].tanh() @ self.outer)


def samples():
    prompts, tokens = (np.array([len(each) for each in texts]) for texts in (PROMPTS, RESPONSES))
    return Samples(
        prompt_tokens=np.concatenate(PROMPTS).astype(np.int32),
        prompt_starts=np.cumsum(prompts) - prompts,
        prompt_lengths=prompts,
        response_tokens=np.concatenate(RESPONSES).astype(np.int32),
        response_starts=np.cumsum(tokens) - tokens,
        response_lengths=tokens,
        response_mask=np.ones(sum(tokens), np.uint8),
        rollout_logprobs=np.zeros(sum(tokens), np.float32),
        ref_logprobs=None,
        oldest_versions=np.zeros(3, np.int32),
        rewards=np.zeros(3),
        ordinals=np.arange(3),
        finished=np.ones(3, bool),
        reward_parts={},
    )


class Dense:
    """The same objective by hand: all 20 parameters in one vector, one token after the other."""

    def __init__(self, policy):
        self.policy = policy
        self.old = self.vector()
        places = MASK.nonzero().tolist()
        rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
        self.before = [rows[i][len(PROMPTS[i]) + t - 1] for i, t in places]
        self.chosen = [rows[i][len(PROMPTS[i]) + t] for i, t in places]
        self.advantages = ADVANTAGES[MASK]

    def vector(self):
        return torch.cat([each.detach().reshape(-1) for each in self.policy.parameters()])

    def log_p(self, vector):
        inner, outer = vector[:10].view(5, 2), vector[10:].view(2, 5)
        return (inner[self.before].tanh() @ outer / TEMPERATURE).log_softmax(-1)  # [n, V]

    def loss(self, vector):
        token = range(NUM_TOKENS), self.chosen
        ratio = (self.log_p(vector)[token] - self.log_p(self.old)[token]).exp()
        return -(ratio * self.advantages).mean()

    def kl(self, vector):
        old = self.log_p(self.old)
        return (old.exp() * (old - self.log_p(vector))).sum(-1).mean()

    def fisher(self):
        return torch.autograd.functional.hessian(self.kl, self.old)

    def gradient(self):
        return torch.autograd.functional.jacobian(self.loss, self.old)


@pytest.fixture
def policy():
    return TinyPolicy()


@pytest.fixture
def dense(policy):
    return Dense(policy)


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def objective(policy, dense, request):
    """The objective of a step's batch, cut one way or another."""

    def make(batches=ONE_PIECE, mask=MASK, **settings):
        old = torch.zeros(MASK.shape, dtype=torch.float64)
        old[MASK] = dense.log_p(dense.old)[range(NUM_TOKENS), dense.chosen]
        batch = StepBatch(mask, old, old, torch.zeros(3), None, None, torch.arange(3))
        data = StepData(samples(), batch, Estimates(ADVANTAGES, None), Correction(old, None, {}))
        return BatchObjective(
            policy,
            make_algorithm(settings_class("trpo")(**settings)),
            data,
            batches,
            rank=0,
            packed=request.param,
            temperature=TEMPERATURE,
            sum_over_ranks=lambda tensor: tensor,
        )

    return make


def region(**values):
    return TrustRegion(
        **{"max_kl": 0.01, "cg_iterations": 60, "cg_damping": 0.1, "backtrack_tries": 10} | values
    )


def step_in(objective, region):
    return trust_region_step(objective, region, from_rank_0=lambda tensor: tensor)


@pytest.mark.parametrize("batches", [ONE_PIECE, TWO_PIECES], ids=["one piece", "two pieces"])
def test_loss_gradient_and_fisher_products_are_those_of_the_whole_batch(batches, objective, dense):
    made = objective(batches)
    evaluation, gradient = made.gradient()
    assert evaluation.loss == pytest.approx(float(dense.loss(dense.old)))
    assert evaluation.kl == 0
    assert sum(tokens for _, tokens in evaluation.pieces) == NUM_TOKENS
    torch.testing.assert_close(gradient, dense.gradient())
    products = torch.stack([made.fisher_product(unit) for unit in torch.eye(20, dtype=torch.float64)])
    torch.testing.assert_close(products, dense.fisher())
    assert torch.linalg.eigvalsh(products)[-1] > 0.1, "there is something to compare"


@pytest.mark.parametrize("batches", [ONE_PIECE, TWO_PIECES], ids=["one piece", "two pieces"])
def test_the_step_is_that_of_a_dense_solve(batches, objective, dense):
    damped = dense.fisher() + 0.1 * torch.eye(20, dtype=torch.float64)
    direction = torch.linalg.solve(damped, -dense.gradient())
    longest = (2 * 0.01 / (direction @ damped @ direction)).sqrt() * direction

    metrics, pieces = step_in(objective(batches), region())
    step = dense.vector() - dense.old
    torch.testing.assert_close(step, metrics["policy_step_fraction"] * longest, rtol=1e-4, atol=2e-6)
    assert metrics["policy_grad_norm"] == pytest.approx(float(dense.gradient().norm()))
    assert metrics["policy_step_kl"] == pytest.approx(float(dense.kl(dense.vector())))
    improvement = dense.loss(dense.old) - dense.loss(dense.vector())
    assert metrics["policy_surrogate_improvement"] == pytest.approx(float(improvement))
    assert 0 < metrics["policy_step_kl"] <= 0.01
    assert improvement > 0
    weighted = sum(tokens * float(stats["policy_loss"]) for stats, tokens in pieces) / NUM_TOKENS
    assert weighted == pytest.approx(float(dense.loss(dense.vector())))


@pytest.mark.parametrize("max_kl", [1e-6, 1e-3, 0.1, 2.0])
def test_the_divergence_stays_in_the_region_and_the_surrogate_improves(max_kl, objective, dense):
    metrics, _ = step_in(objective(), region(max_kl=max_kl, cg_iterations=5, cg_damping=0.01))
    assert max_kl / 100 < float(dense.kl(dense.vector())) <= max_kl
    assert float(dense.loss(dense.vector())) < float(dense.loss(dense.old))
    assert metrics["policy_step_fraction"] > 0


def test_a_policy_for_which_no_fraction_will_do_is_as_it_was(objective, dense, policy):
    metrics, pieces = step_in(objective(), region(max_kl=50.0, backtrack_tries=1))
    assert torch.equal(dense.vector(), dense.old)
    assert metrics["policy_step_fraction"] == metrics["policy_step_kl"] == 0
    assert metrics["policy_surrogate_improvement"] == 0
    assert float(pieces[0][0]["policy_approx_kl_k3"]) == 0
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_batch_without_a_token_moves_nothing(objective, dense):
    nothing = objective(mask=torch.zeros_like(MASK))
    metrics, _ = step_in(nothing, region())
    assert metrics["policy_step_fraction"] == metrics["policy_grad_norm"] == 0
    assert torch.equal(dense.vector(), dense.old)


def test_the_penalties_of_the_loss_are_part_of_what_improves(objective, dense):
    """The entropy bonus alone would make the policy uniform."""
    made = objective(entropy_coef=100.0)
    evaluation, _ = made.gradient()
    log_p = dense.log_p(dense.old)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert evaluation.loss == pytest.approx(float(dense.loss(dense.old) - 100 * entropy))
    step_in(made, region())
    log_p = dense.log_p(dense.vector())
    assert -(log_p.exp() * log_p).sum(-1).mean() > entropy


def test_frozen_parameters_stay_where_they_are(objective, policy):
    policy.inner.requires_grad_(False)
    inner, outer = (each.detach().clone() for each in policy.parameters())
    _, gradient = objective().gradient()
    assert gradient.shape == (10,)
    step_in(objective(), region())
    assert torch.equal(policy.inner, inner)
    assert not torch.equal(policy.outer, outer)


def test_every_decision_is_rank_0s(objective):
    """Where rank 0 says that the curvature is not positive, no rank moves."""
    shared = []

    def from_rank_0(tensor):
        shared.append(tensor)
        return -torch.ones(()) if tensor.ndim == 0 else tensor

    metrics, _ = trust_region_step(objective(), region(), from_rank_0=from_rank_0)
    assert metrics["policy_step_fraction"] == 0
    assert [tensor.ndim for tensor in shared].count(1) == 1, "the step itself"


def test_a_model_without_a_forward_derivative_is_named(objective, policy):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return 2 * x

        @staticmethod
        def backward(_, gradient):
            return 2 * gradient

    plain = policy.forward
    policy.forward = lambda **inputs: SimpleNamespace(logits=Doubled.apply(plain(**inputs).logits))
    made = objective()
    with pytest.raises(ModelError, match=r"^the policy \(TinyPolicy\) has no forward-mode derivative"):
        step_in(made, region())
