"""The trust-region step against closed forms."""

import pytest
import torch

from rlhf_dist.ops.trust_region import backtrack, conjugate_gradient, natural_gradient_step


def random_spd(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_conjugate_gradient_solves_the_system(size):
    matrix = random_spd(size, seed=size)
    b = torch.arange(1.0, size + 1, dtype=torch.float64)
    x = conjugate_gradient(lambda v: matrix @ v, b, num_iterations=3 * size, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-9)


def test_conjugate_gradient_needs_an_iteration_a_distinct_eigenvalue():
    diagonal = torch.tensor([2.0, 2.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    calls = []

    def product(v):
        calls.append(v)
        return diagonal * v

    b = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    x = conjugate_gradient(product, b, num_iterations=50)
    assert len(calls) == 2
    torch.testing.assert_close(x, b / diagonal)


def test_decisions_follow_from_the_inner_products_alone():
    """A rank whose own numbers say otherwise does as many products as the one whose dot is everybody's."""
    told, calls = iter([1.0, 1.0, 0.5, -1.0]), []

    def product(v):
        calls.append(v)
        return v

    x = conjugate_gradient(product, torch.ones(3), num_iterations=50, dot=lambda *_: torch.tensor(next(told)))
    assert len(calls) == 2, "the first curvature is 1, the second -1"
    torch.testing.assert_close(x, torch.ones(3))


def test_nothing_to_solve():
    zero = torch.zeros(3)
    assert conjugate_gradient(lambda v: v, zero, num_iterations=5).tolist() == [0, 0, 0]
    assert natural_gradient_step(zero, lambda v: v, max_kl=0.01, num_iterations=5).tolist() == [0, 0, 0]


def test_the_step_is_as_long_as_the_quadratic_model_allows():
    fisher = random_spd(4, seed=1)
    gradient = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    step = natural_gradient_step(gradient, lambda v: fisher @ v, max_kl=0.02, num_iterations=20)
    assert float(0.5 * step @ fisher @ step) == pytest.approx(0.02, rel=1e-6)
    direction = torch.linalg.solve(fisher, gradient)
    torch.testing.assert_close(step / step.norm(), direction / direction.norm(), rtol=1e-6, atol=1e-8)


def test_on_a_categorical_policy_the_kl_is_what_was_asked_for():
    """F of a softmax is diag(p) - p p^T; the natural gradient of sum p r is r - E[r], up to a constant."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    p = logits.softmax(0)
    gradient = p * (rewards - p @ rewards)
    fisher = torch.diag(p) - torch.outer(p, p)
    step = natural_gradient_step(gradient, lambda v: fisher @ v, max_kl=1e-4, num_iterations=10)
    centred = rewards - rewards.mean()
    torch.testing.assert_close(
        (step - step.mean()) / (step - step.mean()).norm(), centred / centred.norm(), rtol=1e-5, atol=1e-7
    )
    moved = (logits + step).log_softmax(0)
    kl = float((p * (p.log() - moved)).sum())
    assert kl == pytest.approx(1e-4, rel=0.02)


def test_backtracking_takes_the_largest_fraction_that_will_do():
    tried = []

    def evaluate(fraction):
        tried.append(fraction)
        return 1.0, fraction**2

    assert backtrack(evaluate, max_kl=0.1) == 0.25
    assert tried == [1.0, 0.5, 0.25]
    assert backtrack(lambda fraction: (0.3 - fraction, 0.0), max_kl=1.0) == 0.25, "it has to improve"
    assert backtrack(lambda _: (-1.0, 0.0), max_kl=1.0, num_tries=4) == 0.0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        conjugate_gradient(lambda v: v, torch.zeros(2, 2), num_iterations=1)
    with pytest.raises(ValueError, match="max_kl"):
        natural_gradient_step(torch.ones(2), lambda v: v, max_kl=0.0, num_iterations=1)
    with pytest.raises(ValueError, match="shrink"):
        backtrack(lambda _: (1.0, 0.0), max_kl=1.0, shrink=1.0)
