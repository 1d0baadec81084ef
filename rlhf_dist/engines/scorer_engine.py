"""What a scoring worker computes: rewards and reference log-probabilities.

Consumes a rollout batch, produces an experience batch: the same rows with `reward`, `reward_parts` and
`ref_logprobs`, less those that a reward or the reference could not score.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from rlhf_dist.data.batching import micro_batches
from rlhf_dist.engines.loading import load_tokenizer, same_tokens
from rlhf_dist.engines.policy_model import PolicyModel
from rlhf_dist.engines.scalar_model import RewardModel
from rlhf_dist.engines.settings import Batching
from rlhf_dist.errors import RewardError, RewardTimeoutError
from rlhf_dist.experience.journal import take_rows
from rlhf_dist.experience.schema import scored_batch
from rlhf_dist.experience.sequences import SequenceBatch, sequence_batch
from rlhf_dist.rewards.functions import (
    FunctionCaller,
    check_scores,
    is_finite,
    load_function,
    raised,
    weighted_sum,
)
from rlhf_dist.rewards.settings import ModelRewardSettings, RewardSettings

Scores = list[float]
Reasons = dict[int, str]
"""By row of a batch: why it could not be scored."""

FAULTS_OF_THE_WORKER = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
"""What a model may raise that says nothing of a sample."""


class Scored(NamedTuple):
    """What became of a batch of rollouts."""

    batch: pa.RecordBatch | None
    """Those rows that could be scored, in their order; None: not one of them."""
    failed: Reasons
    """The others."""


class Part(Protocol):
    """One summand of the reward."""

    def score(self, rollouts: pa.RecordBatch) -> Scores:
        """One finite number a sample.

        Raises:
            RewardError: it has none for the batch as a whole. It may have some for samples by themselves.
        """
        ...


@dataclass(frozen=True)
class ForwardPasses:
    """How models run here."""

    max_tokens_per_micro_batch: int
    batching: Batching
    dtype: torch.dtype
    device: torch.device

    def batches(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, packed: bool
    ) -> Iterator[tuple[list[int], SequenceBatch]]:
        """The sequences in as many passes as the token budget asks for, with the indices of each pass."""
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        for indices in micro_batches(lengths, self.max_tokens_per_micro_batch, packed=packed):
            batch = sequence_batch(
                [prompts[i] for i in indices], [responses[i] for i in indices], packed=packed
            )
            yield indices, batch.to(self.device)


class ScorerEngine:
    """All that scores a sample, in one process."""

    def __init__(
        self,
        rewards: Sequence[RewardSettings],
        *,
        reference_model: str | None,
        policy_model: str,
        forward: ForwardPasses,
    ) -> None:
        """Load the models and functions.

        Args:
            reference_model: checkpoint of the reference policy; None where the algorithm needs none.
            policy_model: where the policy's tokenizer is, to compare a reward model's with.
            forward: how the models run.
        """
        self._weights = {reward.label: reward.weight for reward in rewards}
        self._parts: dict[str, Part] = {
            reward.label: (
                RewardModelPart(reward, policy_model, forward)
                if isinstance(reward, ModelRewardSettings)
                else FunctionPart(reward.path, reward.timeout_s)
            )
            for reward in rewards
        }
        self._reference = None
        if reference_model is not None:
            self._reference = ReferencePolicy(reference_model, forward)

    def score(self, rollouts: pa.RecordBatch, *, temperature: float, scorer: str) -> Scored:
        """Score the samples of a batch, in the name of `scorer`, as many of them as can be.

        Raises:
            RewardTimeoutError: a reward function did not return in time; this process will not get rid of it.
        """
        parts, failed = score_parts(self._parts, rollouts)
        rewards = weighted_sum(parts, self._weights, rollouts.num_rows)
        for row, reward in enumerate(rewards):
            if row not in failed and not is_finite(reward):
                failed[row] = f"the weighted sum of the rewards is {reward}, which is not finite in float32"
        references: dict[int, np.ndarray] = {}
        if self._reference is not None:
            rows = _without(failed, rollouts)
            found = self._reference.logprobs(take_rows(rollouts, rows), temperature)
            references = dict(zip(rows, found, strict=True))
            failed |= {row: NO_REFERENCE for row in rows if not np.isfinite(references[row]).all()}
        rows = _without(failed, rollouts)
        if not rows:
            return Scored(None, failed)
        batch = scored_batch(
            take_rows(rollouts, rows),
            rewards=[rewards[row] for row in rows],
            reward_parts={label: [scores[row] for row in rows] for label, scores in parts.items()},
            ref_logprobs=[references[row] for row in rows] if self._reference is not None else None,
            scorer=scorer,
            scored_at_us=time.time_ns() // 1000,
        )
        return Scored(batch, failed)


NO_REFERENCE = "the reference model gave a log-probability that is not finite"


def score_parts(parts: dict[str, Part], rollouts: pa.RecordBatch) -> tuple[dict[str, Scores], Reasons]:
    """The scores of all parts, NaN where there is none, and by row why there is not: the first part's reason.

    A part that fails on the batch is asked again for each of its samples alone, to know which ones it was.
    """
    scores: dict[str, Scores] = {}
    failed: Reasons = {}
    for label, part in parts.items():
        scores[label], reasons = _score_part(part, rollouts)
        failed = reasons | failed
    return scores, failed


def _score_part(part: Part, rollouts: pa.RecordBatch) -> tuple[Scores, Reasons]:
    try:
        return part.score(rollouts), {}
    except RewardTimeoutError:
        raise
    except RewardError as error:
        if rollouts.num_rows == 1:
            return [math.nan], {0: str(error)}
    scores: Scores = []
    failed: Reasons = {}
    for row in range(rollouts.num_rows):
        alone, reasons = _score_part(part, take_rows(rollouts, [row]))
        scores += alone
        if reasons:
            failed[row] = reasons[0]
    return scores, failed


def _without(failed: Reasons, rollouts: pa.RecordBatch) -> list[int]:
    return [row for row in range(rollouts.num_rows) if row not in failed]


class FunctionPart:
    """A reward that is a Python function."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        self._call = FunctionCaller(path, load_function(path), timeout_s)

    def score(self, rollouts: pa.RecordBatch) -> Scores:
        """One number a sample. Raises as `FunctionCaller`."""
        rows = [json.loads(row) for row in rollouts["columns"].to_pylist()]
        names = sorted({name for row in rows for name in row})
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
        return self._call(rollouts["prompt"].to_pylist(), rollouts["response"].to_pylist(), columns)


class RewardModelPart:
    """A reward that is a sequence classifier."""

    def __init__(self, settings: ModelRewardSettings, policy_model: str, forward: ForwardPasses) -> None:
        self._name = f"reward model {settings.model!r}"
        self._tokenizer = load_tokenizer(settings.model, "reward")
        policy_tokenizer = load_tokenizer(policy_model, "policy")
        self._same_tokens = (
            same_tokens(self._tokenizer, policy_tokenizer)
            and self._tokenizer.chat_template == policy_tokenizer.chat_template
        )
        self._model = RewardModel(settings.model, dtype=forward.dtype, batching=forward.batching)
        self._model.to(forward.device)
        self._forward = forward

    def score(self, rollouts: pa.RecordBatch) -> Scores:
        """One number a sample: the classifier's logit at the end of the response.

        Raises:
            RewardError: a logit is not finite, or a sample is too long for the model, say.
        """
        try:
            logits = self._logits(rollouts)
        except FAULTS_OF_THE_WORKER:
            raise
        except Exception as error:  # models differ in what they raise for an input that they cannot take
            raise RewardError(f"{self._name} {raised(error, rollouts.num_rows)}") from error
        return check_scores(self._name, logits, rollouts.num_rows)

    @torch.no_grad()
    def _logits(self, rollouts: pa.RecordBatch) -> np.ndarray:
        """[rows]"""
        tokens = self._tokens(rollouts)
        logits = np.zeros(len(tokens))
        no_responses = [_NO_TOKENS] * len(tokens)
        for indices, batch in self._forward.batches(tokens, no_responses, packed=self._model.packs):
            logits[indices] = self._model(batch).cpu().numpy()
        return logits

    def _tokens(self, rollouts: pa.RecordBatch) -> list[np.ndarray]:
        if self._same_tokens:
            pairs = zip(_lists(rollouts["prompt_tokens"]), _lists(rollouts["response_tokens"]), strict=True)
            return [np.concatenate(pair) for pair in pairs]
        texts = zip(rollouts["prompt"].to_pylist(), rollouts["response"].to_pylist(), strict=True)
        return [np.array(self._encode(prompt, response)) for prompt, response in texts]

    def _encode(self, prompt: str, response: str) -> list[int]:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        return self._tokenizer(prompt + response)["input_ids"]


class ReferencePolicy:
    """The frozen policy that the KL is measured to."""

    def __init__(self, model: str, forward: ForwardPasses) -> None:
        self._model = PolicyModel(model, dtype=forward.dtype, batching=forward.batching).to(forward.device)
        self._forward = forward

    @torch.no_grad()
    def logprobs(self, rollouts: pa.RecordBatch, temperature: float) -> list[np.ndarray]:
        """[response tokens] nats for each sample, under the distribution tempered by `temperature`."""
        prompts, responses = _lists(rollouts["prompt_tokens"]), _lists(rollouts["response_tokens"])
        logprobs = [_NO_TOKENS.astype(np.float32)] * len(prompts)
        for indices, batch in self._forward.batches(prompts, responses, packed=self._model.packs):
            padded, _ = self._model(batch, temperature, with_entropy=False)
            for row, i in zip(padded.float().cpu().numpy(), indices, strict=True):
                logprobs[i] = row[: len(responses[i])]
        return logprobs


_NO_TOKENS = np.empty(0, np.int32)


def _lists(column: pa.ListArray) -> list[np.ndarray]:
    """The rows of a list column, sharing its memory."""
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]
