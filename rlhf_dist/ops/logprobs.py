"""Log-probabilities and entropies from logits, without a float32 copy of the logits.

The logits of a long batch are the largest tensor of a training step. Here they are read a chunk of rows at
a time, forward and backward: beside the logits and their gradient, which keep their dtype, at most
`CHUNK_BYTES` are in use at once, or `BUFFERS` float32 rows of V where those are larger.

The token shift of a causal model happens here and nowhere else, in `next_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.ops.masked import upcast

CHUNK_BYTES = 64 * 2**20
"""Working memory for logits in float32, forward or backward."""

BUFFERS = 3
"""Tensors of a chunk's size alive at once: two to work in, one where the layout needs a copy."""


def logprobs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label under the tempered distribution.

        logprob = z[label] - logsumexp(z),   z = logits / temperature

    A row whose upstream gradient is 0 gets gradient 0 whatever its logits, NaN included. A second derivative
    raises RuntimeError.

    Args:
        logits: [B, T, V], or any leading dimensions; differentiable.
        labels: [B, T], integers in [0, V), at padded positions too: there is no label to ignore, mask
            what comes out.
        temperature: the sampler's, positive.
    Returns:
        [B, T], float32 (float64 for float64 logits).
    Raises:
        ValueError: labels are not of the logits' leading shape, no integers or not in [0, V), or the
            temperature is not positive.
    """
    _check(logits, temperature, labels)
    return _TokenStatistics.apply(logits, labels, temperature, False)[0]


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the tempered distribution, in nats.

        H = -sum_v p log p,   p = softmax(logits / temperature),   0 log 0 = 0

    Args:
        logits: [B, T, V], or any leading dimensions; differentiable. -inf stands for p = 0.
        temperature: the sampler's, positive.
    Returns:
        [B, T], float32 (float64 for float64 logits).
    Raises:
        ValueError: the temperature is not positive.
    """
    _check(logits, temperature)
    return _TokenStatistics.apply(logits, None, temperature, True)[1]


def logprobs_and_entropy(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`logprobs_from_logits` and `entropy_from_logits` in one pass over the logits.

    Args, Raises: as there. Returns: (logprobs, entropy), both [B, T] and both differentiable.
    """
    _check(logits, temperature, labels)
    return _TokenStatistics.apply(logits, labels, temperature, True)


def next_tokens(tokens: Tensor) -> Tensor:
    """The labels of a causal model's logits: position s predicts token s + 1.

    Args:
        tokens: [B, S], prompt and response.
    Returns:
        [B, S]. The last position has nothing to predict; it holds a valid token that counts for nothing.
    """
    return tokens.roll(-1, dims=-1)


class _TokenStatistics(torch.autograd.Function):
    """(logprobs or None, entropy or None), each of the logits' leading shape.

    With log p = log_softmax(x / temperature), which is computed again in the backward pass:

        d logprob / dx_v = ([v = label] - p_v) / temperature
        d H / dx_v       = -p_v (log p_v + H) / temperature
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, temperature: float, with_entropy: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        shape = logits.shape[:-1]
        logprobs, entropy = logits.new_empty(2, shape.numel(), dtype=_work_dtype(logits)).unbind()
        labels = labels.reshape(-1, 1).long() if labels is not None else None
        for rows, x in _chunks(logits):
            label = labels[rows] if labels is not None else None
            _statistics(x, label, temperature, logprobs[rows], entropy[rows] if with_entropy else None)
        ctx.save_for_backward(logits, labels, entropy.unsqueeze(-1) if with_entropy else None)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return (
            logprobs.view(shape) if labels is not None else None,
            entropy.view(shape) if with_entropy else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # only where a graph of the gradient is asked for
            raise RuntimeError(
                "log-probabilities and entropies of ops.logprobs can be differentiated once; for second "
                "derivatives (create_graph=True) take them from torch's log_softmax"
            )
        logits, labels, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = (grad if grad is None else grad.reshape(-1, 1) for grad in grads)
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        grad_rows = grad_logits.view(-1, logits.shape[-1])
        for rows, x in _chunks(logits):
            grad_rows[rows] = _gradient(
                x,
                ctx.temperature,
                (labels[rows], grad_logprobs[rows]) if grad_logprobs is not None else None,
                (entropy[rows], grad_entropy[rows]) if grad_entropy is not None else None,
            )
        return grad_logits, None, None, None


def _statistics(
    x: Tensor, label: Tensor | None, temperature: float, logprobs: Tensor, entropy: Tensor | None
) -> None:
    """Writes the log-probabilities and entropies of a chunk of rows; its buffers die with the call."""
    log_p = _log_softmax(x, temperature)  # (rows, V)
    if label is not None:
        logprobs.copy_(log_p.gather(-1, label).squeeze(-1))
    if entropy is not None:
        _finite(log_p)
        entropy.copy_(log_p.exp().mul_(log_p).sum(-1).neg_())


def _gradient(
    x: Tensor,
    temperature: float,
    of_logprobs: tuple[Tensor, Tensor] | None,
    of_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Gradient of a chunk of logits, from (label, upstream gradient) and (entropy, upstream gradient)."""
    work = _log_softmax(x, temperature)  # (rows, V), log p
    silent = torch.ones_like(work[:, :1], dtype=torch.bool)
    if of_entropy is not None:
        entropy, upstream = of_entropy
        p = work.exp()
        _finite(work).add_(entropy).mul_(p).mul_(-upstream)
        silent &= upstream == 0
        if of_logprobs is not None:
            work.addcmul_(p, of_logprobs[1], value=-1)
    elif of_logprobs is not None:
        work.exp_().mul_(-of_logprobs[1])
    if of_logprobs is not None:
        label, upstream = of_logprobs
        work.scatter_add_(-1, label, upstream)
        silent &= upstream == 0
    if temperature != 1.0:
        work.div_(temperature)
    return work.masked_fill_(silent, 0.0)


def _log_softmax(x: Tensor, temperature: float) -> Tensor:
    z = upcast(x) if temperature == 1.0 else upcast(x) / temperature
    return z.log_softmax(-1)


def _finite(log_p: Tensor) -> Tensor:
    """In place: the lowest finite number for -inf, because 0 * -inf is NaN."""
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, logits of these rows [rows, V]) over the flattened leading dimensions."""
    step = max(1, CHUNK_BYTES // (BUFFERS * logits.shape[-1] * _work_dtype(logits).itemsize))
    start = 0
    for matrix in _matrices(logits, step):
        for chunk in matrix.split(step):
            yield slice(start, start + len(chunk)), chunk
            start += len(chunk)


def _matrices(logits: Tensor, step: int) -> Iterator[Tensor]:
    """The rows of the logits in order, in matrices [rows, V] that are views if of more than `step` rows."""
    if logits.is_contiguous() or logits.ndim <= 2 or logits.shape[:-1].numel() <= step:
        yield logits.reshape(-1, logits.shape[-1])
    else:
        for part in logits.unbind():
            yield from _matrices(part, step)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, temperature: float, labels: Tensor | None = None) -> None:
    if not temperature > 0:
        raise ValueError(f"expected a positive temperature, received {temperature}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"expected logits of [..., V], received {tuple(logits.shape)}")
    if labels is not None:
        _check_labels(logits, labels)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    """Reads the labels once, and no logits."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected labels of the logits' leading shape, received labels {tuple(labels.shape)}, "
            f"logits {tuple(logits.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"expected integers as labels, received {labels.dtype}")
    if labels.numel() == 0:
        return
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0 or highest >= logits.shape[-1]:
        raise ValueError(
            f"expected labels in [0, {logits.shape[-1]}), at masked positions too, where any such label will "
            f"do; received labels from {lowest} to {highest}"
        )
