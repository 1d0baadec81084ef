"""Digests of tensors where they are, on a GPU too, where no byte-wise hash is at hand.

A multilinear hash: the tensor's bytes as 32-bit words w_i, and two sums, of w_i a_i and of w_i b_i modulo
2^64, with fixed pseudo-random odd factors, each added to the number of bytes. A change of one word always
shows, since an odd factor has an inverse; one of several words as good as always. It finds damage; it is no
defence against whoever wants to deceive it. (Carter and Wegman, Universal classes of hash functions, 1979.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from rlhf_dist.weights.snapshot import flat

WORD_BYTES = 4
CHUNK_WORDS = 8 * 1024 * 1024
"""Digested at once without a GPU: each takes 8 bytes a few times over."""
_GOLDEN, _FIRST, _SECOND = (
    each - 2**64 if each >= 2**63 else each
    for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
)
_HIGH_BITS = 31


def word_sums(tensor: torch.Tensor) -> torch.Tensor:
    """The two sums, where the tensor is; they begin at its length in bytes. Shape [2], int64."""
    data = flat(tensor.detach().contiguous()).view(torch.uint8)
    missing = -data.numel() % WORD_BYTES
    words = (pad(data, (0, missing)) if missing else data).view(torch.int32)
    sums = torch.full((2,), data.numel(), dtype=torch.int64, device=words.device)
    if words.is_cuda:
        from rlhf_dist.weights.device_digest_kernel import add_sums

        add_sums(words, sums, (_GOLDEN, _FIRST, _SECOND), _HIGH_BITS)
        return sums
    for begin in range(0, words.numel(), CHUNK_WORDS):
        sums += _sums(words[begin : begin + CHUNK_WORDS], begin)
    return sums


def hex_digests(sums: Sequence[torch.Tensor]) -> list[str]:
    """The digests of several tensors in hexadecimal; waits for the device once."""
    if not sums:
        return []
    return ["".join(f"{each % 2**64:016x}" for each in pair) for pair in torch.stack(list(sums)).tolist()]


def _sums(words: torch.Tensor, begin: int) -> torch.Tensor:
    mixed = torch.arange(begin, begin + words.numel(), device=words.device).mul_(_GOLDEN)
    mixed ^= mixed >> _HIGH_BITS
    wide = words.to(torch.int64)
    return torch.stack([(wide * (mixed * factor | 1)).sum() for factor in (_FIRST, _SECOND)])
