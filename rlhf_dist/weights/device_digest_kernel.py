"""The sums of `device_digest` in one pass over a GPU's memory: Triton, which torch for GPUs brings along."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_WORDS = 2048
"""What a program takes at once: 16 words a thread."""
PROGRAMS_PER_PROCESSOR = 8
"""Enough to keep the memory busy; each ends with two atomic additions to the same place."""


@triton.jit
def _add_sums(words, sums, num_words, golden, first, second, high_bits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    in_block = tl.arange(0, BLOCK).to(tl.int64)
    one = tl.zeros([BLOCK], tl.int64)
    other = tl.zeros([BLOCK], tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, num_words, stride):
        at = begin + in_block
        word = tl.load(words + at, mask=at < num_words, other=0).to(tl.int64)
        mixed = at * golden
        mixed ^= mixed >> high_bits
        one += word * (mixed * first | 1)
        other += word * (mixed * second | 1)
    tl.atomic_add(sums, tl.sum(one))
    tl.atomic_add(sums + 1, tl.sum(other))


def add_sums(words: torch.Tensor, sums: torch.Tensor, factors: tuple[int, int, int], high_bits: int) -> None:
    """Add both sums of the words; modulo 2^64, so the order of the additions does not matter.

    Args:
        words: int32, flat, on a GPU.
        sums: [2], int64, there too.
        factors: what spreads a word's number, and a factor for each sum.
        high_bits: by how many bits the spread number is folded.
    """
    if words.numel() == 0:
        return
    num_processors = torch.cuda.get_device_properties(words.device).multi_processor_count
    num_programs = min(triton.cdiv(words.numel(), BLOCK_WORDS), PROGRAMS_PER_PROCESSOR * num_processors)
    with torch.cuda.device(words.device):
        _add_sums[(num_programs,)](words, sums, words.numel(), *factors, high_bits, BLOCK=BLOCK_WORDS)
