"""Arrow batches of experience: what is written, what is known of a batch, and which versions are read."""

from __future__ import annotations

import json

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
    check_version,
    rollout_batch,
    scored_batch,
)
from rlhf_dist.types import BatchInfo


def test_a_rollout_batch_holds_each_completion_in_its_row(completion, prompts):
    completions = [completion(3, 1, length=2, version=5), completion(0, length=1, finish_reason="length")]
    batch = rollout_batch(completions, producer="rollout worker 4", prompts=prompts)
    assert batch.schema.equals(ROLLOUT_SCHEMA, check_metadata=True)
    assert batch.to_pylist() == [
        {
            "ordinal": 3,
            "sample": 1,
            "row": 3,
            "seed": 3107,
            "producer": "rollout worker 4",
            "finish_reason": "stop",
            "prompt": "prompt 3",
            "response": "response 3.1",
            "columns": '{"answer": 3}',
            "prompt_tokens": [3150, 3151],
            "response_tokens": [3100, 3101],
            "response_mask": [1, 1],
            "rollout_logprobs": [-3100 / 4096, -3101 / 4096],
            "policy_versions": [5, 5],
        },
        {
            "ordinal": 0,
            "sample": 0,
            "row": 0,
            "seed": 7,
            "producer": "rollout worker 4",
            "finish_reason": "length",
            "prompt": "prompt 0",
            "response": "response 0.0",
            "columns": '{"answer": 0}',
            "prompt_tokens": [50, 51],
            "response_tokens": [0],
            "response_mask": [1],
            "rollout_logprobs": [0.0],
            "policy_versions": [0],
        },
    ]


def test_prompts_in_several_chunks_are_found_by_row(completion, prompts):
    chunked = pa.concat_tables([prompts.slice(0, 2), prompts.slice(2)])
    assert chunked["prompt"].num_chunks == 2
    batch = rollout_batch([completion(5), completion(1)], producer="w", prompts=chunked)
    assert batch["prompt"].to_pylist() == ["prompt 5", "prompt 1"]
    assert [json.loads(row)["answer"] for row in batch["columns"].to_pylist()] == [5, 1]


def test_an_empty_response_is_an_empty_list(completion, prompts):
    batch = rollout_batch([completion(1, length=0)], producer="w", prompts=prompts)
    names = ("response_tokens", "response_mask", "rollout_logprobs", "policy_versions")
    assert [batch[name].to_pylist() for name in names] == [[[]]] * 4


def test_a_scored_batch_adds_reward_parts_and_reference(completion, prompts):
    rollouts = rollout_batch(
        [completion(1, length=2), completion(2, length=1)], producer="w", prompts=prompts
    )
    batch = scored_batch(
        rollouts,
        rewards=[0.5, -1],
        reward_parts={"help": [2, 3], "tone": [-0.25, 0]},
        ref_logprobs=[np.array([-0.5, -0.25], np.float32), np.array([-2.0], np.float32)],
    )
    assert batch.schema.equals(EXPERIENCE_SCHEMA, check_metadata=True)
    assert batch.select(rollouts.schema.names).to_pylist() == rollouts.to_pylist()
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
        rollouts.slice(3), rewards=[3, 4], reward_parts={"r": [3, 4]}, ref_logprobs=references
    )
    assert batch["ordinal"].to_pylist() == [3, 4]
    assert batch["response_tokens"].to_pylist() == [[3000, 3001, 3002], [4000, 4001, 4002, 4003]]
    assert batch["ref_logprobs"].to_pylist() == [[-3.0] * 3, [-4.0] * 4]


def test_what_is_known_of_a_batch_are_its_counts(completion, scored):
    batch = scored(
        [completion(1, length=2, version=9), completion(2, length=0), completion(3, length=4, version=7)]
    )
    info = batch_info(batch)
    assert info == BatchInfo(num_samples=3, num_response_tokens=6, num_bytes=batch.nbytes, oldest_version=7)
    assert info.num_bytes > 6 * (4 + 1 + 4 + 4 + 4)


def test_what_is_known_of_a_slice_leaves_the_rest_out(completion, scored):
    batch = scored([completion(i, length=i, version=i) for i in range(1, 5)])
    info = batch_info(batch.slice(2, 1))
    assert (info.num_samples, info.num_response_tokens, info.oldest_version) == (1, 3, 3)
    assert info.num_bytes < batch_info(batch).num_bytes


def test_the_oldest_token_counts_not_the_oldest_sample(completion, scored):
    import dataclasses

    mixed = dataclasses.replace(completion(1, length=3), policy_versions=[4, 2, 5])
    assert batch_info(scored([completion(0, version=6), mixed])).oldest_version == 2


@pytest.mark.parametrize("schema", [ROLLOUT_SCHEMA, EXPERIENCE_SCHEMA], ids=["rollout", "experience"])
def test_its_own_schema_is_read(schema):
    check_version(schema)
    check_version(pa.ipc.read_schema(schema.serialize()))


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
        check_version(EXPERIENCE_SCHEMA.with_metadata(metadata))
