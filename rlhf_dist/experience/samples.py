"""The learner's view of a leased batch: flat token arrays with offsets, padded only a micro-batch at a time.

Token columns come out of the Arrow buffers whole, never sample by sample. The order is (ordinal, sample),
whatever order the batches arrived in, so that a step does not depend on who was fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from rlhf_dist.experience.schema import check_version


@dataclass(frozen=True)
class Samples:
    """A batch of B samples with N response tokens in all.

    `prompt_offsets` and `response_offsets` are [B + 1]; the tokens of sample i are
    `response_tokens[response_offsets[i] : response_offsets[i + 1]]`.
    """

    prompt_tokens: np.ndarray  # [sum of prompt lengths] int32
    prompt_offsets: np.ndarray  # [B + 1] int64
    response_tokens: np.ndarray  # [N] int32
    response_offsets: np.ndarray  # [B + 1] int64
    response_mask: np.ndarray  # [N] uint8
    rollout_logprobs: np.ndarray  # [N] float32
    policy_versions: np.ndarray  # [N] int32
    ref_logprobs: np.ndarray | None  # [N] float32
    rewards: np.ndarray  # [B] float64
    ordinals: np.ndarray  # [B] int64
    finished: np.ndarray  # [B] bool: ended by itself, not cut at the token limit
    reward_parts: dict[str, np.ndarray]  # name -> [B] float64

    @classmethod
    def from_batches(cls, batches: Sequence[pa.RecordBatch]) -> Samples:
        """Concatenate scored batches and put them in the order (ordinal, sample)."""
        for batch in batches:
            check_version(batch.schema)
        table = pa.Table.from_batches(batches).sort_by([("ordinal", "ascending"), ("sample", "ascending")])
        table = table.combine_chunks()
        prompt_tokens, prompt_offsets = _ragged(table["prompt_tokens"])
        response_tokens, response_offsets = _ragged(table["response_tokens"])
        ref_logprobs, _ = _ragged(table["ref_logprobs"])
        parts = table["reward_parts"].to_pylist()
        names = [name for name, _ in parts[0]] if parts else []
        return cls(
            prompt_tokens=prompt_tokens,
            prompt_offsets=prompt_offsets,
            response_tokens=response_tokens,
            response_offsets=response_offsets,
            response_mask=_ragged(table["response_mask"])[0],
            rollout_logprobs=_ragged(table["rollout_logprobs"])[0],
            policy_versions=_ragged(table["policy_versions"])[0],
            ref_logprobs=ref_logprobs if len(ref_logprobs) == len(response_tokens) else None,
            rewards=table["reward"].to_numpy().copy(),
            ordinals=table["ordinal"].to_numpy().copy(),
            finished=np.array([reason == "stop" for reason in table["finish_reason"].to_pylist()]),
            reward_parts={name: np.array([dict(row)[name] for row in parts]) for name in names},
        )

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.rewards)

    @property
    def response_lengths(self) -> np.ndarray:
        """[B] response tokens."""
        return np.diff(self.response_offsets)

    @property
    def total_lengths(self) -> list[int]:
        """[B] prompt and response tokens: what a forward pass costs."""
        return (np.diff(self.prompt_offsets) + self.response_lengths).tolist()

    def sequences(self, indices: Sequence[int]) -> SequenceBatch:
        """The chosen samples, padded on the right, with the place of each response."""
        prompts = [self.prompt_tokens[self.prompt_offsets[i] : self.prompt_offsets[i + 1]] for i in indices]
        responses = [
            self.response_tokens[self.response_offsets[i] : self.response_offsets[i + 1]] for i in indices
        ]
        return SequenceBatch.build(prompts, responses)

    def padded(self, flat: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A flat [N] per-token array as [B, T], zero beyond each response's end."""
        pieces = torch.as_tensor(flat).split(self.response_lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)

    def scatter(self, padded: torch.Tensor, indices: Sequence[int], *, into: torch.Tensor) -> None:
        """Write the rows of [B', T], one a chosen sample, to their places in a flat [N] array."""
        for row, i in zip(padded.cpu(), indices, strict=False):  # a batch without samples has one idle row
            into[self.response_offsets[i] : self.response_offsets[i + 1]] = row[: self.response_lengths[i]]


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts and responses of B samples in one right-padded rectangle."""

    input_ids: torch.Tensor  # [B, S] int64
    attention_mask: torch.Tensor  # [B, S] int64
    response_start: torch.Tensor  # [B] int64: column of the first response token
    response_length: torch.Tensor  # [B] int64

    @classmethod
    def build(cls, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> SequenceBatch:
        """Pad the concatenation of each prompt and its response.

        Without samples it is one column of padding with no response: a forward pass that a rank
        without work of its own runs because the others' collectives wait for it.
        """
        if not prompts:
            one = torch.zeros(1, 2, dtype=torch.int64)
            return cls(one, torch.ones_like(one), torch.ones(1, dtype=torch.int64), torch.zeros(1).long())
        rows = [
            torch.from_numpy(np.concatenate([p, r]).astype(np.int64))
            for p, r in zip(prompts, responses, strict=True)
        ]
        return cls(
            input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            attention_mask=torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            ),
            response_start=torch.tensor([len(prompt) for prompt in prompts]),
            response_length=torch.tensor([len(response) for response in responses]),
        )

    def model_inputs(self) -> tuple[torch.Tensor, ...]:
        """The four fields in order: the first arguments of the policy's and value model's forward pass."""
        return self.input_ids, self.attention_mask, self.response_start, self.response_length

    def to(self, device: torch.device) -> SequenceBatch:
        """The same batch on another device."""
        return SequenceBatch(*(tensor.to(device) for tensor in self.model_inputs()))


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column of a combined table, with one copy of the whole column."""
    chunks = column.chunks
    if not chunks:
        return np.empty(0, column.type.value_type.to_pandas_dtype()), np.zeros(1, np.int64)
    (lists,) = chunks
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return lists.values.to_numpy()[offsets[0] : offsets[-1]].copy(), offsets - offsets[0]
