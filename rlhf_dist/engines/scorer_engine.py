"""What a scoring worker computes: rewards and reference log-probabilities.

Consumes a rollout batch, produces an experience batch: the same rows with `reward`, `reward_parts` and
`ref_logprobs`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rlhf_dist.data.batching import micro_batches
from rlhf_dist.engines.loading import load_tokenizer, same_tokens
from rlhf_dist.engines.policy_model import PolicyModel
from rlhf_dist.engines.scalar_model import RewardModel
from rlhf_dist.experience.samples import SequenceBatch
from rlhf_dist.experience.schema import scored_batch
from rlhf_dist.rewards.functions import call_function, check_scores, load_function, weighted_sum
from rlhf_dist.rewards.settings import ModelRewardSettings, RewardSettings

Scores = list[float]


class ScorerEngine:
    """All that scores a sample, in one process."""

    def __init__(
        self,
        rewards: Sequence[RewardSettings],
        *,
        reference_model: str | None,
        policy_model: str,
        max_tokens_per_micro_batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Load the models and functions.

        Args:
            reference_model: checkpoint of the reference policy; None where the algorithm needs none.
            policy_model: where the policy's tokenizer is, to compare a reward model's with.
        """
        self._weights = {reward.label: reward.weight for reward in rewards}
        self._parts = {
            reward.label: (
                RewardModelPart(reward, policy_model, max_tokens_per_micro_batch, dtype, device)
                if isinstance(reward, ModelRewardSettings)
                else FunctionPart(reward.path)
            )
            for reward in rewards
        }
        self._reference = None
        if reference_model is not None:
            self._reference = ReferencePolicy(reference_model, max_tokens_per_micro_batch, dtype, device)

    def score(self, rollouts: pa.RecordBatch, *, temperature: float) -> pa.RecordBatch:
        """Score every sample of a batch.

        Raises:
            RewardError: a reward did not give one finite number a sample.
        """
        parts = {label: part.score(rollouts) for label, part in self._parts.items()}
        ref_logprobs = None
        if self._reference is not None:
            ref_logprobs = self._reference.logprobs(rollouts, temperature)
        return scored_batch(
            rollouts,
            rewards=weighted_sum(parts, self._weights, rollouts.num_rows),
            reward_parts=parts,
            ref_logprobs=ref_logprobs,
        )


class FunctionPart:
    """A reward that is a Python function."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._function = load_function(path)

    def score(self, rollouts: pa.RecordBatch) -> Scores:
        """One number a sample."""
        rows = [json.loads(row) for row in rollouts["columns"].to_pylist()]
        names = sorted({name for row in rows for name in row})
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
        return call_function(
            self._path,
            self._function,
            rollouts["prompt"].to_pylist(),
            rollouts["response"].to_pylist(),
            columns,
        )


class RewardModelPart:
    """A reward that is a sequence classifier."""

    def __init__(
        self,
        settings: ModelRewardSettings,
        policy_model: str,
        max_tokens_per_micro_batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._name = f"reward model {settings.model!r}"
        self._tokenizer = load_tokenizer(settings.model, "reward")
        policy_tokenizer = load_tokenizer(policy_model, "policy")
        self._same_tokens = (
            same_tokens(self._tokenizer, policy_tokenizer)
            and self._tokenizer.chat_template == policy_tokenizer.chat_template
        )
        self._model = RewardModel(settings.model, dtype=dtype).to(device)
        self._max_tokens, self._device = max_tokens_per_micro_batch, device

    @torch.no_grad()
    def score(self, rollouts: pa.RecordBatch) -> Scores:
        """One number a sample: the classifier's logit at the end of the response."""
        tokens = self._tokens(rollouts)
        scores = np.zeros(len(tokens))
        for batch in micro_batches([len(row) for row in tokens], self._max_tokens):
            sequences = SequenceBatch.build([tokens[i] for i in batch], [_NO_TOKENS] * len(batch))
            sequences = sequences.to(self._device)
            scores[batch] = self._model(sequences.input_ids, sequences.attention_mask).cpu().numpy()
        return check_scores(self._name, scores, len(tokens))

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

    def __init__(
        self, model: str, max_tokens_per_micro_batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = PolicyModel(model, dtype=dtype).to(device)
        self._max_tokens, self._device = max_tokens_per_micro_batch, device

    @torch.no_grad()
    def logprobs(self, rollouts: pa.RecordBatch, temperature: float) -> list[np.ndarray]:
        """[response tokens] nats for each sample, under the distribution tempered by `temperature`."""
        prompts, responses = _lists(rollouts["prompt_tokens"]), _lists(rollouts["response_tokens"])
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        logprobs = [_NO_TOKENS.astype(np.float32)] * len(lengths)
        for batch in micro_batches(lengths, self._max_tokens):
            sequences = SequenceBatch.build([prompts[i] for i in batch], [responses[i] for i in batch])
            sequences = sequences.to(self._device)
            padded, _ = self._model(*sequences.model_inputs(), temperature, with_entropy=False)
            for row, i in zip(padded.float().cpu().numpy(), batch, strict=True):
                logprobs[i] = row[: len(responses[i])]
        return logprobs


_NO_TOKENS = np.empty(0, np.int32)


def _lists(column: pa.ListArray) -> list[np.ndarray]:
    """The rows of a list column, sharing its memory."""
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]
