"""Batches of experience whose every token tells which sample it belongs to."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from rlhf_dist.experience.schema import rollout_batch, scored_batch
from rlhf_dist.types import Completion, GenerationRequest, VersionSpan

NUM_PROMPTS = 20


def _prompts():
    return pa.table(
        {
            "prompt": [f"prompt {row}" for row in range(NUM_PROMPTS)],
            "columns": [json.dumps({"answer": row}) for row in range(NUM_PROMPTS)],
        }
    )


def _completion(ordinal, sample=0, *, prompt_length=2, length=3, finish_reason="stop", version=0, attempt=0):
    base = 1000 * ordinal + 100 * sample
    request = GenerationRequest(
        ordinal=ordinal,
        sample=sample,
        row=ordinal % NUM_PROMPTS,
        seed=base + 7,
        prompt_tokens=[base + 50 + place for place in range(prompt_length)],
        submitted_at_us=1_000_000 * ordinal,
        attempt=attempt,
    )
    return Completion(
        request=request,
        text=f"response {ordinal}.{sample}",
        tokens=[base + place for place in range(length)],
        logprobs=[-(base + place) / 4096 for place in range(length)],
        version_spans=(VersionSpan(version, 0, length),),
        finish_reason=finish_reason,
        finished_at_us=1_000_000 * ordinal + 250_000,
    )


def _scored(completions, *, reference=True):
    """Reward: ordinal + sample / 10. Reference log-probability of a token: half of the rollout's."""
    rollouts = rollout_batch(completions, producer="rollout worker 0", prompts=_prompts())
    ordinals = [completion.request.ordinal for completion in completions]
    samples = [completion.request.sample for completion in completions]
    return scored_batch(
        rollouts,
        rewards=[ordinal + sample / 10 for ordinal, sample in zip(ordinals, samples, strict=True)],
        reward_parts={"help": ordinals, "tone": samples},
        ref_logprobs=[np.array(completion.logprobs, np.float32) / 2 for completion in completions]
        if reference
        else None,
        scorer="scoring worker 1",
        scored_at_us=1_700_000_000_000_000,
    )


@pytest.fixture(scope="session")
def prompts():
    """The tokenized data set, as far as these modules read it."""
    return _prompts()


@pytest.fixture(scope="session")
def completion():
    """Makes the response to (ordinal, sample)."""
    return _completion


@pytest.fixture(scope="session")
def scored():
    """Makes a scored batch of completions."""
    return _scored
