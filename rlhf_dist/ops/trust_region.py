"""The trust-region step: conjugate gradients on Fisher-vector products, and a backtracking line search.

Schulman et al. 2015, "Trust Region Policy Optimization", arXiv:1502.05477, section 6 and appendix C.
Parameters are one flat vector here; how it is spread over tensors and ranks is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]

Dot = Callable[[Tensor, Tensor], Tensor]
"""The inner product of two vectors [P]. Every decision follows from its results alone: processes to which it
gives the same number make the same calls."""


def conjugate_gradient(
    matvec: MatVec, b: Tensor, *, num_iterations: int, tolerance: float = 1e-10, dot: Dot = torch.dot
) -> Tensor:
    """Solves A x = b for a symmetric positive definite A that is known by its products only.

    Hestenes and Stiefel 1952. Exact after as many iterations as A has distinct eigenvalues; a few give a
    useful direction.

    Args:
        matvec: v -> A v.
        b: [P].
        num_iterations: at most.
        tolerance: stops once |A x - b|^2 is below `tolerance` * |b|^2.
        dot: the inner product.

    Returns:
        x, [P].

    Raises:
        ValueError: b is not a vector.
    """
    if b.ndim != 1:
        raise ValueError(f"expected a vector, received {tuple(b.shape)}")
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = dot(residual, residual)
    limit = tolerance * squared
    for _ in range(num_iterations):
        if squared <= limit:
            break
        product = matvec(direction)
        curvature = dot(direction, product)
        if curvature <= 0:
            break  # rounding: beyond here the direction leads nowhere
        alpha = squared / curvature
        x = x + alpha * direction
        residual = residual - alpha * product
        squared_before, squared = squared, dot(residual, residual)
        direction = residual + (squared / squared_before) * direction
    return x


def natural_gradient_step(
    gradient: Tensor, fisher_product: MatVec, *, max_kl: float, num_iterations: int, dot: Dot = torch.dot
) -> Tensor:
    """The longest step along the natural gradient that the quadratic model of the KL allows.

        s = F^-1 g,   step = sqrt(2 max_kl / (s^T F s)) s       (appendix C)

    Args:
        gradient: [P], of the objective to be maximised.
        fisher_product: v -> F v, with F the Hessian of KL(old || new) at the old parameters.
        max_kl: the trust region, in nats.
        num_iterations: of conjugate gradients.
        dot: the inner product.

    Returns:
        [P]; 0 where the gradient is 0.

    Raises:
        ValueError: max_kl is not positive.
    """
    if not max_kl > 0:
        raise ValueError(f"expected a positive max_kl, received {max_kl}")
    direction = conjugate_gradient(fisher_product, gradient, num_iterations=num_iterations, dot=dot)
    curvature = dot(direction, fisher_product(direction))
    if curvature <= 0:
        return torch.zeros_like(gradient)
    return (2 * max_kl / curvature).sqrt() * direction


def backtrack(
    evaluate: Callable[[float], tuple[float, float]],
    *,
    max_kl: float,
    shrink: float = 0.5,
    num_tries: int = 10,
) -> float:
    """The largest fraction 1, shrink, shrink^2, ... of a step that improves and stays in the trust region.

    Args:
        evaluate: fraction -> (improvement of the surrogate objective, KL from the old policy in nats).
        max_kl: the trust region, in nats.
        shrink: factor from one try to the next, between 0 and 1.
        num_tries: fractions that are tried.

    Returns:
        The fraction; 0 where none will do.

    Raises:
        ValueError: `shrink` is not between 0 and 1.
    """
    if not 0 < shrink < 1:
        raise ValueError(f"expected 0 < shrink < 1, received {shrink}")
    for attempt in range(num_tries):
        fraction = shrink**attempt
        improvement, kl = evaluate(fraction)
        if improvement > 0 and kl <= max_kl:
            return fraction
    return 0.0
