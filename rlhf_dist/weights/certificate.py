"""The proof that a rollout worker serves the learner's weights.

A digest proves that bytes arrived. It does not prove that they were loaded into the right place: a
tied head that was never assigned, a fused projection in the wrong order or a stale cache all pass it.
So each worker also computes its own log-probabilities of a fixed sequence and compares them with the
learner's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.errors import NotProvedError
from rlhf_dist.types import Probe

PROBE_NUM_TOKENS = 16
"""A forward pass over so few tokens costs hardly more than reading the weights; 64 cost four times that."""
TOLERANCE_NATS = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.15}
"""Largest allowed difference by the engine's dtype; float32 is what the tests hold to."""


def probe_tokens(vocab_size: int, context_tokens: int) -> tuple[int, ...]:
    """A fixed pseudo-random sequence over the vocabulary, the same in every process. Length <= 16."""
    num_tokens = min(PROBE_NUM_TOKENS, context_tokens - 1)
    generator = np.random.Generator(np.random.Philox(key=20260101))
    return tuple(int(token) for token in generator.integers(0, vocab_size, size=num_tokens))


def prove(worker: str, version: int, probe: Probe, logprobs: Sequence[float], tolerance_nats: float) -> float:
    """Compare a worker's probe log-probabilities with the learner's.

    Returns:
        The largest absolute difference, in nats.

    Raises:
        NotProvedError: it is above the tolerance (the message gives both numbers), or the probe is empty.
    """
    served, published = np.asarray(logprobs, dtype=np.float64), np.asarray(probe.logprobs, dtype=np.float64)
    if served.shape != published.shape:
        raise NotProvedError(
            f"{worker} answered the probe of policy version {version} with {served.size} log-probabilities, "
            f"the learner published {published.size}"
        )
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, which proves nothing
        differences = np.abs(served - published)
    if not served.size:
        raise NotProvedError(
            f"the probe of policy version {version} has no token to compare, so {worker} can prove nothing; "
            "give the rollout workers a context of at least 3 tokens"
        )
    worst = int(np.argmax(np.where(np.isfinite(differences), differences, np.inf)))
    if not differences[worst] <= tolerance_nats:
        raise NotProvedError(
            f"{worker} does not serve the weights of policy version {version}: for probe token {worst + 1} "
            f"it gives log-probability {served[worst]:.6f}, the learner {published[worst]:.6f} "
            f"(difference {differences[worst]:.2e} nats, allowed {tolerance_nats:.0e}). "
            "The engine and the learner compute different models from the same snapshot."
        )
    return float(differences[worst])
