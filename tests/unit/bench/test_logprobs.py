"""The bench of log-probabilities: small sizes, real processes, real memory."""

from __future__ import annotations

import pytest

from rlhf_dist.bench.logprobs import MIB, Peak, peak_bytes
from rlhf_dist.ops.logprobs import CHUNK_BYTES

NUM_TOKENS, VOCAB_SIZE = 2048, 40_000
LOGITS_BYTES = NUM_TOKENS * VOCAB_SIZE * 2
SLACK_BYTES = 8 * MIB
"""Log-probabilities, autograd's nodes, the pages of code that a first call touches."""


def test_chunks_stay_within_their_bound_beside_logits_and_gradient():
    peak = peak_bytes("chunked", num_tokens=NUM_TOKENS, vocab_size=VOCAB_SIZE, dtype="bfloat16")
    assert peak.logits_bytes == LOGITS_BYTES
    assert CHUNK_BYTES / 4 < peak.forward_bytes < CHUNK_BYTES + SLACK_BYTES
    assert LOGITS_BYTES < peak.backward_bytes < LOGITS_BYTES + CHUNK_BYTES + SLACK_BYTES


def test_the_plain_way_takes_two_float32_copies_and_then_three():
    """Forward: copy and result. Backward: the result, the gradient of it, that of the copy."""
    peak = peak_bytes("plain", num_tokens=NUM_TOKENS, vocab_size=VOCAB_SIZE, dtype="bfloat16")
    assert peak.forward_bytes == pytest.approx(2 * 2 * LOGITS_BYTES, abs=SLACK_BYTES)
    assert peak.backward_bytes == pytest.approx(3 * 2 * LOGITS_BYTES, abs=SLACK_BYTES)


def test_what_is_worked_in_is_the_larger_of_both_passes():
    assert Peak("plain", "bfloat16", 100, 300, 350).work_bytes == 300
    assert Peak("chunked", "bfloat16", 100, 60, 170).work_bytes == 70
