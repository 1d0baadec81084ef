"""The Arrow schema of experience. One row is one sample; token columns are ragged lists, never padded.

Rollout workers write `ROLLOUT_SCHEMA`; scoring workers add the scored columns and write
`EXPERIENCE_SCHEMA`. The version travels in the schema's metadata, and a reader refuses another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_dist.errors import RunError
from rlhf_dist.types import BatchInfo, BatchPlace, Completion, SampleInfo

SCHEMA_VERSION = 2
VERSION_KEY = b"rlhf_dist.experience_version"
_METADATA = {VERSION_KEY: str(SCHEMA_VERSION).encode()}

_TIME = pa.timestamp("us", "UTC")
_VERSION_SPANS = pa.list_(
    pa.struct([pa.field(name, pa.int32(), nullable=False) for name in ("version", "start", "end")])
)

_ROLLOUT_FIELDS = [
    pa.field("ordinal", pa.int64(), nullable=False),  # prompt ordinal
    pa.field("epoch", pa.int32(), nullable=False),  # passes over the data set before this prompt
    pa.field("sample", pa.int32(), nullable=False),  # index among the prompt's samples
    pa.field("attempt", pa.int32(), nullable=False),  # times the ordinal had been handed out before
    pa.field("row", pa.int64(), nullable=False),  # row of the data set
    pa.field("seed", pa.int64(), nullable=False),  # of the request
    pa.field("oldest_version", pa.int32(), nullable=False),  # policy version of the oldest token
    pa.field("newest_version", pa.int32(), nullable=False),  # and of the newest one
    pa.field("producer", pa.string(), nullable=False),  # rollout worker
    pa.field("submitted_at", _TIME, nullable=False),  # to the engine
    pa.field("finished_at", _TIME, nullable=False),  # by the engine
    pa.field("finish_reason", pa.string(), nullable=False),  # stop | length
    pa.field("prompt", pa.string(), nullable=False),  # as in the data set
    pa.field("response", pa.string(), nullable=False),  # decoded, without special tokens
    pa.field("columns", pa.string(), nullable=False),  # the data set's row, a JSON object
    pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
    pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),
    pa.field("response_mask", pa.list_(pa.uint8()), nullable=False),  # 1: the policy chose the token
    pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),  # nats, tempered distribution
    pa.field("version_spans", _VERSION_SPANS, nullable=False),  # version by token: [start, end) of each
]
_SCORED_FIELDS = [
    pa.field("scorer", pa.string(), nullable=False),  # scoring worker
    pa.field("scored_at", _TIME, nullable=False),
    pa.field("reward", pa.float64(), nullable=False),  # weighted sum of the parts
    pa.field("reward_parts", pa.map_(pa.string(), pa.float64()), nullable=False),  # unweighted, by name
    pa.field("ref_logprobs", pa.list_(pa.float32()), nullable=False),  # nats, tempered; empty: no reference
]

ROLLOUT_SCHEMA = pa.schema(_ROLLOUT_FIELDS, metadata=_METADATA)
EXPERIENCE_SCHEMA = pa.schema(_ROLLOUT_FIELDS + _SCORED_FIELDS, metadata=_METADATA)

INFO_COLUMNS = ("ordinal", "sample", "attempt", "oldest_version", "newest_version", "response_tokens")
"""What `SampleInfo` is made from; of the tokens only their number."""


def rollout_batch(completions: Sequence[Completion], *, producer: str, prompts: pa.Table) -> pa.RecordBatch:
    """Completions as one batch of `ROLLOUT_SCHEMA`; texts and columns come from the prompt table."""
    requests = [completion.request for completion in completions]
    texts = prompts.take([request.row for request in requests])
    columns = {
        "ordinal": [request.ordinal for request in requests],
        "epoch": [request.ordinal // prompts.num_rows for request in requests],
        "sample": [request.sample for request in requests],
        "attempt": [request.attempt for request in requests],
        "row": [request.row for request in requests],
        "seed": [request.seed for request in requests],
        "oldest_version": [_versions(completion)[0] for completion in completions],
        "newest_version": [_versions(completion)[-1] for completion in completions],
        "producer": [producer] * len(requests),
        "submitted_at": [request.submitted_at_us for request in requests],
        "finished_at": [completion.finished_at_us for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "prompt": texts["prompt"].combine_chunks(),
        "response": [completion.text for completion in completions],
        "columns": texts["columns"].combine_chunks(),
        "prompt_tokens": [request.prompt_tokens for request in requests],
        "response_tokens": [completion.tokens for completion in completions],
        "response_mask": [[1] * len(completion.tokens) for completion in completions],
        "rollout_logprobs": [completion.logprobs for completion in completions],
        "version_spans": [
            [span._asdict() for span in completion.version_spans] for completion in completions
        ],
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type=field.type)
        for field, column in ((field, columns[field.name]) for field in ROLLOUT_SCHEMA)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=ROLLOUT_SCHEMA)


def scored_batch(
    rollouts: pa.RecordBatch,
    *,
    rewards: Sequence[float],
    reward_parts: dict[str, Sequence[float]],
    ref_logprobs: Sequence[np.ndarray] | None,
    scorer: str,
    scored_at_us: int,
) -> pa.RecordBatch:
    """The rollouts with their scores, as one batch of `EXPERIENCE_SCHEMA`."""
    names = list(reward_parts)
    parts = [[(name, float(reward_parts[name][i])) for name in names] for i in range(rollouts.num_rows)]
    references = ref_logprobs if ref_logprobs is not None else [np.empty(0, np.float32)] * rollouts.num_rows
    scored = [
        pa.array([scorer] * rollouts.num_rows, pa.string()),
        pa.array([scored_at_us] * rollouts.num_rows, _TIME),
        pa.array([float(reward) for reward in rewards], pa.float64()),
        pa.array(parts, EXPERIENCE_SCHEMA.field("reward_parts").type),
        pa.array(references, pa.list_(pa.float32())),
    ]
    return pa.RecordBatch.from_arrays(rollouts.columns + scored, schema=EXPERIENCE_SCHEMA)


def sample_infos(batch: pa.RecordBatch) -> list[SampleInfo]:
    """What the ledger knows of each row of a batch, which needs only `INFO_COLUMNS`."""
    *numbers, responses = INFO_COLUMNS
    columns = [batch[name].to_pylist() for name in numbers]
    columns.append(pc.list_value_length(batch[responses]).to_pylist())
    return [SampleInfo(*row) for row in zip(*columns, strict=True)]


def batch_info(batch: pa.RecordBatch, place: BatchPlace | None = None) -> BatchInfo:
    """What the queue and the driver may know of a scored batch, and where the journal holds it."""
    return BatchInfo(samples=tuple(sample_infos(batch)), num_bytes=batch.nbytes, place=place)


def check_schema(schema: pa.Schema, expected: pa.Schema) -> None:
    """Refuse experience that another version of the schema wrote, or that has other columns than it says.

    Args:
        expected: `ROLLOUT_SCHEMA` or `EXPERIENCE_SCHEMA`.

    Raises:
        RunError: with both versions, or with the columns that differ.
    """
    found = (schema.metadata or {}).get(VERSION_KEY, b"none").decode()
    if found != str(SCHEMA_VERSION):
        raise RunError(
            f"experience has schema version {found}, this program reads version {SCHEMA_VERSION}; "
            "read it with the version of rlhf_dist that wrote it"
        )
    if not schema.equals(expected):
        raise RunError(
            f"experience says that it has schema version {SCHEMA_VERSION}, and has other columns: "
            f"{'; '.join(_differences(schema, expected))}"
        )


def _differences(schema: pa.Schema, expected: pa.Schema) -> list[str]:
    names = dict.fromkeys([*expected.names, *schema.names])
    pairs = [(name, *(_type_of(name, each) for each in (schema, expected))) for name in names]
    found = [f"{name} is {ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs]
    return found or ["they come in another order"]


def _type_of(name: str, schema: pa.Schema) -> str:
    if name not in schema.names:
        return "missing"
    field = schema.field(name)
    return f"{field.type} or null" if field.nullable else str(field.type)


def _versions(completion: Completion) -> list[int]:
    """Policy versions of a response, oldest first."""
    return sorted(span.version for span in completion.version_spans)
