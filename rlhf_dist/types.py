"""Records that cross processes, and the legend of shapes.

Shapes, everywhere in the package:
    B   sequences (one sequence is one prompt with one sampled response)
    T   response tokens of the longest sequence in a batch; shorter ones are padded on the right
    S   prompt and response tokens of the longest sequence in a batch
    V   vocabulary
    N   tokens of a ragged batch, one after the other, without padding

A *prompt ordinal* counts the prompts in the order of training, from 0, for ever; its data set row is
a function of the ordinal and the run's seed. A *sample* is one response to one prompt ordinal. A
*policy version* is the number of learner steps behind the weights that sampled a token: version 0
is the starting policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GenerationRequest:
    """One sample to generate."""

    ordinal: int
    sample: int
    row: int
    """Row of the data set that the prompt came from."""
    seed: int
    """Seed of this request's own random generator, a function of (run seed, ordinal, sample)."""
    prompt_tokens: list[int]


@dataclass(frozen=True)
class Completion:
    """One finished response. The four lists have one entry a response token."""

    request: GenerationRequest
    text: str
    tokens: list[int]
    logprobs: list[float]
    """Of the sampled token under the tempered distribution it was sampled from."""
    policy_versions: list[int]
    finish_reason: str
    """`stop` (end-of-sequence token or stop string) or `length` (cut at the token limit)."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a weight snapshot."""

    name: str
    dtype: str
    """torch's name without the prefix, as in `float32`."""
    shape: tuple[int, ...]
    digest: str
    """xxh3-128 of the raw bytes, in hexadecimal."""


@dataclass(frozen=True)
class Probe:
    """A fixed token sequence and the log-probabilities that a model gives its tokens 1..n-1."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class WeightManifest:
    """What a weight snapshot must contain, and how a worker proves that it serves it."""

    version: int
    tensors: tuple[TensorEntry, ...]
    probe: Probe


WeightPayload = list[np.ndarray]
"""The raw bytes of a snapshot: one uint8 array a tensor, in the manifest's order."""


@dataclass(frozen=True)
class ServedVersion:
    """A rollout worker's proof that it serves a version."""

    worker: str
    version: int
    max_abs_difference: float
    """Largest difference in nats between the worker's probe log-probabilities and the learner's."""
    seconds: float


@dataclass(frozen=True)
class BatchInfo:
    """What the driver and the queue know of a batch of experience: counts, never the tokens."""

    num_samples: int
    num_response_tokens: int
    num_bytes: int
    oldest_version: int
