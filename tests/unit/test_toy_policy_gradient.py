"""The toy example of docs/policy-gradient.md: the page's own code, against enumeration."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "policy-gradient.md"
NUM_ESTIMATES, NUM_SAMPLES = 200, 500


@pytest.fixture(scope="module")
def toy():
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)
    return SimpleNamespace(**namespace)


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def estimates(toy, policy, baseline):
    generator = torch.Generator().manual_seed(11)
    drawn = [
        flat(toy.sampled_gradient(policy, NUM_SAMPLES, generator, baseline)) for _ in range(NUM_ESTIMATES)
    ]
    return torch.stack(drawn)


def test_the_exact_gradient_is_that_of_finite_differences(toy):
    policy = toy.new_policy(seed=0)
    exact = flat(toy.exact_gradient(policy))
    step = 1e-6
    measured = []
    for parameter in policy:
        for place in range(parameter.numel()):
            around = []
            for sign in (1, -1):
                parameter.data.view(-1)[place] += sign * step
                around.append(toy.expected_reward(policy).item())
                parameter.data.view(-1)[place] -= sign * step
            measured.append((around[0] - around[1]) / (2 * step))
    torch.testing.assert_close(exact, torch.tensor(measured, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("baseline", [0.0, 0.2])
def test_the_log_derivative_estimate_is_unbiased(toy, baseline):
    policy = toy.new_policy(seed=0)
    exact = flat(toy.exact_gradient(policy))
    assert exact.abs().max() > 0.01
    drawn = estimates(toy, policy, baseline)
    standard_error = drawn.std(dim=0) / NUM_ESTIMATES**0.5
    assert standard_error.max() < exact.abs().max() / 20, "the test would notice a bias"
    assert ((drawn.mean(dim=0) - exact).abs() <= 3 * standard_error).all()


def test_a_baseline_makes_the_estimate_less_noisy(toy):
    policy = toy.new_policy(seed=0)
    mean_reward = toy.expected_reward(policy).item()
    plain, with_baseline = (
        estimates(toy, policy, baseline).var(dim=0).sum() for baseline in (0, mean_reward)
    )
    assert with_baseline < 0.9 * plain


def test_gradient_ascent_reaches_the_optimum(toy):
    policy = toy.new_policy(seed=0)
    assert toy.expected_reward(policy).item() < 0.35
    assert toy.ascend(policy, toy.exact_gradient, num_steps=2000, learning_rate=2.0) > 0.99


def test_sampled_gradient_ascent_reaches_the_optimum(toy):
    policy = toy.new_policy(seed=0)
    generator = torch.Generator().manual_seed(5)

    def gradient(policy):
        return toy.sampled_gradient(policy, 256, generator, baseline=0.3)

    assert toy.ascend(policy, gradient, num_steps=1500, learning_rate=2.0) > 0.97
