"""Arrow batches of experience: what is written, what is known of a batch, and which versions are read."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from rlhf_dist.errors import RunError
from rlhf_dist.experience.schema import (
    EXPERIENCE_SCHEMA,
    ROLLOUT_SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    batch_info,
    check_schema,
    rollout_batch,
    scored_batch,
)
from rlhf_dist.types import BatchInfo, BatchPlace, SampleInfo, VersionSpan


def test_a_rollout_batch_holds_each_completion_in_its_row(completion, prompts):
    completions = [
        replace(
            completion(23, 1, length=2, attempt=2), version_spans=(VersionSpan(5, 0, 1), VersionSpan(6, 1, 2))
        ),
        completion(0, length=1, finish_reason="length"),
    ]
    batch = rollout_batch(completions, producer="rollout worker 4", prompts=prompts)
    assert batch.schema.equals(ROLLOUT_SCHEMA, check_metadata=True)
    assert batch.to_pylist() == [
        {
            "ordinal": 23,
            "epoch": 1,
            "sample": 1,
            "attempt": 2,
            "row": 3,
            "seed": 23107,
            "oldest_version": 5,
            "newest_version": 6,
            "producer": "rollout worker 4",
            "submitted_at": datetime(1970, 1, 1, 0, 0, 23, tzinfo=UTC),
            "finished_at": datetime(1970, 1, 1, 0, 0, 23, 250_000, tzinfo=UTC),
            "finish_reason": "stop",
            "prompt": "prompt 3",
            "response": "response 23.1",
            "columns": '{"answer": 3}',
            "prompt_tokens": [23150, 23151],
            "response_tokens": [23100, 23101],
            "response_mask": [1, 1],
            "rollout_logprobs": [-23100 / 4096, -23101 / 4096],
            "version_spans": [
                {"version": 5, "start": 0, "end": 1},
                {"version": 6, "start": 1, "end": 2},
            ],
        },
        {
            "ordinal": 0,
            "epoch": 0,
            "sample": 0,
            "attempt": 0,
            "row": 0,
            "seed": 7,
            "oldest_version": 0,
            "newest_version": 0,
            "producer": "rollout worker 4",
            "submitted_at": datetime(1970, 1, 1, tzinfo=UTC),
            "finished_at": datetime(1970, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC),
            "finish_reason": "length",
            "prompt": "prompt 0",
            "response": "response 0.0",
            "columns": '{"answer": 0}',
            "prompt_tokens": [50, 51],
            "response_tokens": [0],
            "response_mask": [1],
            "rollout_logprobs": [0.0],
            "version_spans": [{"version": 0, "start": 0, "end": 1}],
        },
    ]


def test_prompts_in_several_chunks_are_found_by_row(completion, prompts):
    chunked = pa.concat_tables([prompts.slice(0, 2), prompts.slice(2)])
    assert chunked["prompt"].num_chunks == 2
    batch = rollout_batch([completion(5), completion(1)], producer="w", prompts=chunked)
    assert batch["prompt"].to_pylist() == ["prompt 5", "prompt 1"]
    assert [json.loads(row)["answer"] for row in batch["columns"].to_pylist()] == [5, 1]


def test_an_empty_response_is_an_empty_list(completion, prompts):
    batch = rollout_batch([completion(1, length=0, version=3)], producer="w", prompts=prompts)
    names = ("response_tokens", "response_mask", "rollout_logprobs")
    assert [batch[name].to_pylist() for name in names] == [[[]]] * 3
    assert batch["oldest_version"].to_pylist() == batch["newest_version"].to_pylist() == [3]


def test_a_scored_batch_adds_reward_parts_and_reference(completion, prompts):
    rollouts = rollout_batch(
        [completion(1, length=2), completion(2, length=1)], producer="w", prompts=prompts
    )
    batch = scored_batch(
        rollouts,
        rewards=[0.5, -1],
        reward_parts={"help": [2, 3], "tone": [-0.25, 0]},
        ref_logprobs=[np.array([-0.5, -0.25], np.float32), np.array([-2.0], np.float32)],
        scorer="scoring worker 3",
        scored_at_us=1_500_000,
    )
    assert batch.schema.equals(EXPERIENCE_SCHEMA, check_metadata=True)
    assert batch.select(rollouts.schema.names).to_pylist() == rollouts.to_pylist()
    assert batch["scorer"].to_pylist() == ["scoring worker 3"] * 2
    assert batch["scored_at"].to_pylist() == [datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)] * 2
    assert batch["reward"].to_pylist() == [0.5, -1.0]
    assert batch["reward_parts"].to_pylist() == [
        [("help", 2.0), ("tone", -0.25)],
        [("help", 3.0), ("tone", 0.0)],
    ]
    assert batch["ref_logprobs"].to_pylist() == [[-0.5, -0.25], [-2.0]]


def test_without_a_reference_its_column_is_empty_lists(completion, scored):
    assert scored([completion(1), completion(2)], reference=False)["ref_logprobs"].to_pylist() == [[], []]


def test_a_slice_of_rollouts_is_scored_in_its_own_rows(completion, prompts):
    rollouts = rollout_batch([completion(i, length=i) for i in range(5)], producer="w", prompts=prompts)
    references = [np.full(3, -3, np.float32), np.full(4, -4, np.float32)]
    batch = scored_batch(
        rollouts.slice(3),
        rewards=[3, 4],
        reward_parts={"r": [3, 4]},
        ref_logprobs=references,
        scorer="s",
        scored_at_us=0,
    )
    assert batch["ordinal"].to_pylist() == [3, 4]
    assert batch["response_tokens"].to_pylist() == [[3000, 3001, 3002], [4000, 4001, 4002, 4003]]
    assert batch["ref_logprobs"].to_pylist() == [[-3.0] * 3, [-4.0] * 4]


def test_what_is_known_of_a_batch_are_its_names_and_counts(completion, scored):
    batch = scored(
        [completion(1, length=2, version=9), completion(2, length=0), completion(3, length=4, version=7)]
    )
    info = batch_info(batch)
    assert info == BatchInfo(
        samples=(
            SampleInfo(1, 0, 0, oldest_version=9, newest_version=9, num_tokens=2),
            SampleInfo(2, 0, 0, oldest_version=0, newest_version=0, num_tokens=0),
            SampleInfo(3, 0, 0, oldest_version=7, newest_version=7, num_tokens=4),
        ),
        num_bytes=batch.nbytes,
    )
    assert (info.num_samples, info.num_response_tokens) == (3, 6)
    place = BatchPlace("scoring-worker-0-000001", 4)
    assert batch_info(batch, place) == replace(info, place=place)
    assert info.num_bytes > 6 * (4 + 1 + 4 + 4 + 4)


def test_what_is_known_of_a_slice_leaves_the_rest_out(completion, scored):
    batch = scored([completion(i, length=i, version=i) for i in range(1, 5)])
    info = batch_info(batch.slice(2, 1))
    assert info.samples == (SampleInfo(3, 0, 0, oldest_version=3, newest_version=3, num_tokens=3),)
    assert info.num_bytes < batch_info(batch).num_bytes


def test_versions_are_those_of_the_oldest_and_the_newest_token(completion, scored):
    spans = (VersionSpan(4, 0, 1), VersionSpan(2, 1, 2), VersionSpan(5, 2, 3))
    mixed = replace(completion(1, length=3), version_spans=spans)
    info = batch_info(scored([completion(0, version=6), mixed]))
    assert [(sample.oldest_version, sample.newest_version) for sample in info.samples] == [(6, 6), (2, 5)]


@pytest.mark.parametrize("schema", [ROLLOUT_SCHEMA, EXPERIENCE_SCHEMA], ids=["rollout", "experience"])
def test_its_own_schema_is_read(schema):
    check_schema(schema, schema)
    check_schema(pa.ipc.read_schema(schema.serialize()), schema)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({VERSION_KEY: str(SCHEMA_VERSION + 1).encode()}, str(SCHEMA_VERSION + 1)),
        ({VERSION_KEY: b"0"}, "0"),
        ({}, "none"),
        (None, "none"),
        ({b"x": b"1"}, "none"),
    ],
)
def test_experience_of_another_version_is_refused_with_both_numbers(metadata, found):
    message = f"^experience has schema version {found}, this program reads version {SCHEMA_VERSION}; "
    with pytest.raises(RunError, match=message):
        check_schema(EXPERIENCE_SCHEMA.with_metadata(metadata), EXPERIENCE_SCHEMA)


def test_columns_other_than_those_of_the_version_are_refused_by_name():
    reward = EXPERIENCE_SCHEMA.get_field_index("reward")
    as_text = EXPERIENCE_SCHEMA.set(reward, pa.field("reward", pa.string(), nullable=True))
    for schema, difference in (
        (as_text, "reward is string or null, not double"),
        (EXPERIENCE_SCHEMA.remove(reward), "reward is missing, not double"),
        (EXPERIENCE_SCHEMA.append(pa.field("mood", pa.int8(), nullable=False)), "mood is int8, not missing"),
        (pa.schema([*EXPERIENCE_SCHEMA][::-1], EXPERIENCE_SCHEMA.metadata), "they come in another order"),
    ):
        message = f"experience says that it has schema version 2, and has other columns: {difference}"
        with pytest.raises(RunError, match=f"^{message}$"):
            check_schema(schema, EXPERIENCE_SCHEMA)
