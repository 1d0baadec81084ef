"""Experience as scoring workers write it, made without an engine: lengths, texts and columns are lifelike."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rlhf_dist.experience.schema import rollout_batch, scored_batch
from rlhf_dist.types import Completion, GenerationRequest, VersionSpan

PROMPT_TOKENS = 24
VOCAB_SIZE = 50_000
TEXT_OF_TOKEN = "word "
PROMPTS = pa.table(
    {
        "prompt": ["Where is my red lamp, and when will it come?"],
        "columns": [
            json.dumps({"prompt": "Where is my red lamp, and when will it come?", "article": "lamp"})
        ],
    }
)


def experience_batch(num_samples: int, *, response_tokens: int, seed: int) -> pa.RecordBatch:
    """A scored batch: prompts of about 24 tokens, responses of any length up to `response_tokens`.

    Ordinals count from 0 and policy version is 0; see `renamed`.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, response_tokens, size=num_samples, endpoint=True)
    completions = [
        Completion(
            request=GenerationRequest(
                ordinal, 0, row=0, seed=seed, prompt_tokens=_tokens(draw, PROMPT_TOKENS), submitted_at_us=0
            ),
            text=TEXT_OF_TOKEN * int(length),
            tokens=_tokens(draw, length),
            logprobs=draw.normal(-2.0, 1.0, size=length).tolist(),
            version_spans=(VersionSpan(0, 0, int(length)),),
            finish_reason="stop",
            finished_at_us=0,
        )
        for ordinal, length in enumerate(lengths)
    ]
    rewards = draw.random(num_samples).tolist()
    return scored_batch(
        rollout_batch(completions, producer="bench", prompts=PROMPTS),
        rewards=rewards,
        reward_parts={"reward": rewards},
        ref_logprobs=[draw.normal(-2.0, 1.0, size=length).astype(np.float32) for length in lengths],
        scorer="bench",
        scored_at_us=0,
    )


def renamed(batch: pa.RecordBatch, ordinals: Sequence[int], version: int) -> pa.RecordBatch:
    """The first samples of a batch as those of other prompts, sampled by another policy version."""
    batch = batch.slice(0, len(ordinals))
    versions = pa.array([version] * len(ordinals), pa.int32())
    spans = batch["version_spans"]
    columns = {
        "ordinal": pa.array(ordinals, pa.int64()),
        "oldest_version": versions,
        "newest_version": versions,
        "version_spans": pa.ListArray.from_arrays(
            pa.array(range(len(ordinals) + 1), pa.int32()),
            pa.StructArray.from_arrays(
                [versions, spans.flatten().field("start"), spans.flatten().field("end")],
                fields=list(spans.type.value_type),
            ),
            type=spans.type,
        ),
    }
    arrays = [
        columns.get(field.name, column) for field, column in zip(batch.schema, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def _tokens(draw: np.random.Generator, count: int) -> list[int]:
    return draw.integers(VOCAB_SIZE, size=count).tolist()
