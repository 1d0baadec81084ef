"""Sequences one after the other in one row, and attention that keeps them apart.

A pack has no padding: every layer computes real tokens only. Attention is block-diagonal, and the blocks off
the diagonal are never computed: each sequence attends by itself, neighbours of equal length together. On a
GPU, in half precision, one kernel does sequences of several lengths (FlashAttention).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_dist.engines.settings import Batching
from rlhf_dist.errors import ModelError

IMPLEMENTATION = "rlhf_dist_packed"
"""Name of the attention in transformers' registry."""

MAX_HEAD_DIM = 256
"""Of FlashAttention, in multiples of 8."""

TRIAL_LENGTHS = (3, 5)
TRIAL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""Largest difference of a logit or state between a packed and a plain pass, relative to the largest one."""


def choose_packing(transformer: Any, batching: Batching, name: str) -> bool:
    """Whether a transformer's batches are to be packed; if so, its attention has been switched.

    Args:
        name: of the model, for the error.

    Raises:
        ModelError: `batching` insists, and the model does not compute the same.
    """
    if batching == "padded":
        return False
    packs = pack_attention(transformer)
    if batching == "packed" and not packs:
        raise ModelError(
            f"{name} does not compute the same when its sequences are packed into one row; "
            "set batching to auto or padded"
        )
    return packs


def pack_attention(transformer: Any) -> bool:
    """Switch a transformer to packed rows, if it then still computes the same; returns whether it does.

    The trial runs the transformer on two sequences one by one, then on both in a row. What fails it, such as
    recurrent layers or positions that are counted over the whole row, keeps its own attention.
    """
    before = transformer.config._attn_implementation
    tokens = [
        torch.arange(length) % transformer.config.get_text_config().vocab_size for length in TRIAL_LENGTHS
    ]
    with torch.no_grad():
        plain = torch.cat([_first_output(transformer(input_ids=each[None])) for each in tokens], dim=1)
        try:
            transformer.set_attn_implementation(IMPLEMENTATION)
            packed = _first_output(transformer(**packed_inputs(tokens)))
        except (TypeError, ValueError, RuntimeError):
            packed = torch.full_like(plain, torch.nan)
    error = (packed - plain).abs().max() / plain.abs().max().clamp(min=1.0)
    if error <= TRIAL_TOLERANCE[plain.dtype]:
        return True
    transformer.set_attn_implementation(before)
    return False


def packed_inputs(sequences: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of a transformer's forward pass over a pack of sequences, each [its length]."""
    return {
        "input_ids": torch.cat(list(sequences))[None],  # [1, N]
        "position_ids": torch.cat([torch.arange(len(each)) for each in sequences])[None],
        "sequence_lengths": tuple(len(each) for each in sequences),
    }


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack; query, key and value are [1, heads, N, head size].

    Returns:
        [1, N, heads, head size], as transformers expects it.
    """
    del attention_mask
    runs = [(length, len(list(equal))) for length, equal in groupby(sequence_lengths)]
    if len(runs) > 1 and _one_kernel_fits(query):
        return _flash_attention(query, key, value, sequence_lengths, sliding_window, options["scaling"]), None
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(
        runs, *(each.split(sizes, dim=2) for each in (query, key, value)), strict=True
    ):
        q, k, v = (part.unflatten(2, (count, length)).squeeze(0).transpose(0, 1) for part in parts)
        mask = _window(length, sliding_window, q.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **options)  # [count, length, heads, size]
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _one_kernel_fits(query: Tensor) -> bool:
    """Whether FlashAttention computes this; where second derivatives are needed, SDPA's is switched off."""
    half, head_dim = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    fits = half and head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0
    return query.is_cuda and fits and torch.backends.cuda.flash_sdp_enabled()


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    sliding_window: int | None,
    scale: float | None,
) -> Tensor:
    """The same of [1, heads, N, head size] each; where keys and values have fewer heads, these are shared."""
    ends = _ends(lengths, query.device)
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    output = varlen_attn(
        *(each[0].transpose(0, 1) for each in (query, key, value)),
        ends,
        ends,
        max(lengths),
        max(lengths),
        scale=scale,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    return output[None]


@lru_cache(maxsize=4)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence ends, and 0 first; the same in every layer."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, length, length]: the causal mask of a sliding window; None where it reaches everywhere."""
    if sliding_window is None or length <= sliding_window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return ((distance >= 0) & (distance < sliding_window))[None, None]


def _no_mask(**_: Any) -> None:
    """A pack needs no mask: its attention knows where sequences end."""


def _first_output(output: Any) -> Tensor:
    return output[0]


AttentionInterface.register(IMPLEMENTATION, _packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
