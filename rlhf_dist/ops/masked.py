"""Means and whitening over the valid tokens, and the small parts that all of `ops` is built from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all ranks; it may or may not write into its argument."""

WHITEN_EPS = 1e-8
"""Added to the variance, inside the root."""


def masked_mean(x: Tensor, mask: Tensor, *, all_reduce: AllReduce | None = None) -> Tensor:
    """Mean over the valid tokens, of all ranks where `all_reduce` is given.

        mean = sum(k x) / sum(k),   0 where sum(k) = 0

    The gradient is 1/sum(k) at each valid token of this rank: gradients of the ranks are to be added.

    Args:
        x: any shape.
        mask: the shape of `x`.
        all_reduce: sums a tensor over the ranks. None: this batch alone.
    Returns:
        A scalar.
    Raises:
        ValueError: shapes differ.
    """
    check_shapes(x=x, mask=mask)
    mask = as_bool(mask)
    total, count = keep(x, mask).sum(), mask.sum()
    if all_reduce is not None:
        local = total.detach()
        summed = all_reduce(torch.stack([local, count.to(local.dtype)]))
        total, count = total + (summed[0] - local), summed[1]
    return total / count.clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, *, all_reduce: AllReduce | None = None
) -> Tensor:
    """Zero mean and unit variance over the valid tokens, of all ranks where `all_reduce` is given.

        y = (x - mean) / sqrt(var + 1e-8),   var = sum(k (x - mean)^2) / (N - 1),   N = sum(k)

    The corrected two-pass algorithm (Chan, Golub, LeVeque 1983, eq. 1.7): the mean of the deviations,
    which is the rounding error of the first mean, is taken off again. Otherwise a batch of equal large
    values would come out as noise instead of 0. Without a spread, and for N <= 1, y is 0 (the mean, where
    `shift_mean` is False). Differentiable where `all_reduce` is None.

    Args:
        x: any shape.
        mask: the shape of `x`.
        shift_mean: False puts the mean back after scaling.
        all_reduce: sums a tensor over the ranks; called twice, each time with two numbers.
    Returns:
        The shape of `x`, 0 at masked positions.
    Raises:
        ValueError: shapes differ.
    """
    check_shapes(x=x, mask=mask)
    mask = as_bool(mask)
    x = keep(x, mask)
    reduce = all_reduce if all_reduce is not None else _this_rank_alone

    total, count = reduce(torch.stack([x.sum(), mask.sum().to(x.dtype)])).unbind()
    mean = total / count.clamp(min=1)
    deviation = keep(x - mean, mask)
    error, squares = reduce(torch.stack([deviation.sum(), deviation.square().sum()])).unbind()
    error = error / count.clamp(min=1)
    variance = ((squares - count * error.square()) / (count - 1).clamp(min=1)).clamp(min=0)

    whitened = (deviation - error) * torch.rsqrt(variance + WHITEN_EPS)
    return keep(whitened if shift_mean else whitened + (mean + error), mask)


def last_valid(mask: Tensor) -> Tensor:
    """True at the last valid token of each row, nowhere in a row without one.

    Args:
        mask: [B, T].
    Returns:
        [B, T], bool.
    """
    mask = as_bool(mask)
    remaining = mask.long().flip(-1).cumsum(-1).flip(-1)  # (B, T) valid tokens from here on
    return mask & (remaining == 1)


def as_bool(mask: Tensor) -> Tensor:
    """The mask as bool: True where it is not zero."""
    return mask if mask.dtype == torch.bool else mask != 0


def upcast(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`upcast(x)` where the bool `mask` holds, else 0: the rest reaches neither value nor gradient."""
    return torch.where(mask, upcast(x), 0.0)


def check_shapes(ndim: int | None = None, **tensors: Tensor) -> None:
    """Raises ValueError unless all shapes are equal, and of `ndim` dimensions where it is given."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    received = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, received {received}")
    if ndim is not None and any(len(shape) != ndim for shape in shapes.values()):
        raise ValueError(f"expected {ndim} dimensions, received {received}")


def check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    """Raises ValueError unless `kind` is one of `kinds`."""
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(kinds)}")


def _this_rank_alone(x: Tensor) -> Tensor:
    return x
