"""Records that cross processes, and the legend of shapes.

Shapes, everywhere in the package:
    B   sequences (one sequence is one prompt with one sampled response)
    T   response tokens of the longest sequence in a batch; shorter ones are padded on the right
    S   prompt and response tokens of the longest sequence in a batch
    V   vocabulary
    N   tokens of a ragged batch, one after the other, without padding

A *prompt ordinal* counts the prompts in the order of training, from 0, for ever; its data set row is
a function of the ordinal and the run's seed. A *sample* is one response to one prompt ordinal. An
*attempt* counts, from 0, how often an ordinal was handed out again, after a worker was lost for example.
A *policy version* is the number of learner steps behind the weights that sampled a token: version 0
is the starting policy. Times `..._at_us` are microseconds since 1970 in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np


class AttemptId(NamedTuple):
    """One of the times that a prompt was handed out."""

    ordinal: int
    attempt: int


class PromptAttempt(NamedTuple):
    """A prompt handed out for generation."""

    ordinal: int
    attempt: int
    samples: tuple[int, ...]
    """Those of its samples that are asked for."""


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
    submitted_at_us: int
    attempt: int = 0
    temperature: float = 1.0


class VersionSpan(NamedTuple):
    """Response tokens `start` to `end`, without `end`, that one policy version sampled."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """One finished response. `tokens` and `logprobs` have one entry a response token."""

    request: GenerationRequest
    text: str
    tokens: list[int]
    logprobs: list[float]
    """Of the sampled token under the tempered distribution it was sampled from."""
    version_spans: tuple[VersionSpan, ...]
    """They cover the response from its first token to its last, in order. A response without tokens has one
    empty span: the version that it ended under."""
    finish_reason: str
    """`stop` (end-of-sequence token or stop string) or `length` (cut at the token limit)."""
    finished_at_us: int


@dataclass(frozen=True)
class FileDigest:
    """What a file of a checkpoint must contain."""

    num_bytes: int
    xxh3_128: str
    """Digest of the bytes, in hexadecimal."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a weight snapshot."""

    name: str
    dtype: str
    """torch's name without the prefix, as in `float32`."""
    shape: tuple[int, ...]
    offset: int
    """Where its bytes begin, from the start of the snapshot. Tied tensors share theirs."""
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


Transport = Literal["auto", "shared_memory", "ipc", "nccl"]
"""What brings weights to the engines."""

WeightPayload = np.ndarray
"""All bytes of a snapshot as one uint8 array; the manifest says which tensor is where."""


@dataclass(frozen=True)
class SegmentAddress:
    """A piece of shared memory that holds a snapshot, for the processes of the same node."""

    path: str
    """Where it is opened. It has no name: it is gone with the last process that maps it."""
    token: str
    """What it begins with, in hexadecimal, so that another file under the same path is not taken for it."""
    generation: int
    """Which of the snapshots that the segment holds one after the other is meant."""
    num_bytes: int


@dataclass(frozen=True)
class DeviceAddress:
    """A piece of the learner's GPU memory that holds a snapshot, for processes on the same GPU."""

    gpu: str
    """The GPU's UUID."""
    handle: tuple[Any, ...]
    """What torch needs to map it in another process. Empty where it is no GPU's memory."""
    generation: int
    """Which of the snapshots that the segment holds one after the other is meant."""
    num_bytes: int


@dataclass(frozen=True)
class Link:
    """Where the learner and the processes of one engine meet, to send snapshots from GPU to GPU."""

    host: str
    port: int
    num_ranks: int
    """The learner's rank 0, and each GPU of the engine."""
    timeout_s: float
    """For a snapshot to have come whole."""


@dataclass(frozen=True)
class PublishedWeights:
    """A snapshot that the learner has written: what the driver passes on to the rollout workers."""

    manifest: WeightManifest
    segment: SegmentAddress | DeviceAddress
    node: str
    """Ray's id of the node that the segment is on."""
    probe_s: float
    """What the learner spent on its answer to the probe, in seconds."""
    write_s: float
    """What it spent on gathering, copying and digesting. With `probe_s` this is all that it stood still."""
    sender: Any = None
    """Handle of the learner's rank 0, whom an engine on another GPU asks to send what is in GPU memory."""


@dataclass(frozen=True)
class ServedVersion:
    """A rollout worker's proof that it serves a version."""

    worker: str
    version: int
    max_abs_difference: float
    """Largest difference in nats between the worker's probe log-probabilities and the learner's."""
    load_s: float
    """Verifying and loading the snapshot, in seconds."""
    probe_s: float
    """Answering the probe."""
    proved_at_us: int = 0
    """By the worker's clock, in microseconds since 1970: it samples no token of the version before."""
    num_loads: int = 1
    """How often it loaded the snapshot until the proof held."""


class SampleInfo(NamedTuple):
    """What the ledger knows of one sample."""

    ordinal: int
    sample: int
    attempt: int
    oldest_version: int
    """Policy version of the oldest token: what staleness counts from."""
    newest_version: int
    num_tokens: int
    """Of the response."""


class RolloutReport(NamedTuple):
    """What a rollout worker says of a batch of finished samples."""

    samples: tuple[AttemptId, ...]
    """Which attempt at which prompt each sample is of."""
    newest_version: int
    """Policy version of the newest of their tokens."""
    busy_s: float
    """Time that the engine computed since the last report."""


class BatchPlace(NamedTuple):
    """Where the journal holds a batch. It stays valid when the segment becomes part of an archive."""

    segment: str
    """File name without its suffix."""
    batch: int
    """Place in the segment, from 0."""


class BatchRows(NamedTuple):
    """Some rows of a batch in the journal, ascending."""

    place: BatchPlace
    rows: tuple[int, ...]


class FailedSample(NamedTuple):
    """A sample that a scoring worker could not score."""

    row: int
    """Of the rollout batch that the worker was given."""
    ordinal: int
    sample: int
    attempt: int
    reason: str
    """One line: which reward or model, and what it raised or returned."""


@dataclass(frozen=True)
class ScoreReport:
    """What a scoring worker says of a batch that it scored."""

    info: BatchInfo | None
    """Of the scored batch. None: no row could be scored, and nothing was written to the journal."""
    busy_s: float
    failed: tuple[FailedSample, ...] = ()
    """The rows that are not in the scored batch for what a reward or the reference did with them."""


@dataclass(frozen=True)
class BatchInfo:
    """What the driver and the queue know of a batch of experience: counts and names, never the tokens."""

    samples: tuple[SampleInfo, ...]
    """One a row of the batch, in its order."""
    num_bytes: int
    place: BatchPlace | None = None
    """None: it is not in the journal."""

    @property
    def num_samples(self) -> int:
        """Rows of the batch."""
        return len(self.samples)

    @property
    def num_response_tokens(self) -> int:
        """Of all its samples."""
        return sum(sample.num_tokens for sample in self.samples)
