"""Prompts with their responses as the input of one forward pass: one after the other in a row, or padded.

A packed batch has no padding and needs a model whose attention keeps its sequences apart
(`engines.packing`); a padded one suits every model. Both answer the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_dist.ops.logprobs import next_tokens


class SequenceBatch(Protocol):
    """B sequences of a prompt and a response each."""

    def inputs(self) -> dict[str, Any]:
        """Arguments of the transformer, whose outputs then are [R, C, ...]: rows and columns."""

    @property
    def kept(self) -> Tensor:
        """[K] columns whose outputs are wanted: those that precede a response token, and maybe others."""

    @property
    def labels(self) -> Tensor:
        """[R, K]: the token that each kept column predicts."""

    def responses(self, kept: Tensor) -> Tensor:
        """[R, K] numbers of the kept columns as [B, T]: entry t is of the column before response token t; 0
        beyond each response's end."""

    def last(self, columns: Tensor) -> Tensor:
        """[R, C] numbers of all columns as [B]: that of each sequence's last token."""

    def to(self, device: torch.device) -> SequenceBatch:
        """The same batch on another device."""


def sequence_batch(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, packed: bool
) -> SequenceBatch:
    """Put each prompt and its response together.

    Without samples it is one sequence of two tokens without a response: the forward pass that a rank
    without work of its own runs because the others' collectives wait for it.

    Raises:
        ValueError: prompts and responses are not of one number.
    """
    build = PackedBatch.build if packed else PaddedBatch.build
    if not prompts:
        return build([np.zeros(2, np.int64)], [np.empty(0, np.int64)])
    return build(prompts, responses)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences in one row of N tokens. Neighbours of equal length attend together, so sort by length."""

    tokens: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64: of each token in its own sequence
    prompt_lengths: tuple[int, ...]  # [B]
    response_lengths: tuple[int, ...]  # [B]
    kept: Tensor  # [K] int64: K response tokens in all

    @classmethod
    def build(cls, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> PackedBatch:
        """Concatenate."""
        rows = _rows(prompts, responses)
        prompt_lengths = tuple(len(prompt) for prompt in prompts)
        response_lengths = tuple(len(response) for response in responses)
        starts = accumulate((len(row) for row in rows), initial=0)
        kept = [
            torch.arange(start + prompt - 1, start + prompt - 1 + response)
            for start, prompt, response in zip(starts, prompt_lengths, response_lengths, strict=False)
        ]
        return cls(
            tokens=torch.cat(rows)[None],
            positions=torch.cat([torch.arange(len(row)) for row in rows])[None],
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            kept=torch.cat(kept),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """[B] tokens of each sequence."""
        return tuple(map(sum, zip(self.prompt_lengths, self.response_lengths, strict=True)))

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.tokens, "position_ids": self.positions, "sequence_lengths": self.lengths}

    @property
    def labels(self) -> Tensor:
        return next_tokens(self.tokens)[:, self.kept]

    def responses(self, kept: Tensor) -> Tensor:
        return pad_sequence(kept[0].split(self.response_lengths), batch_first=True)

    def last(self, columns: Tensor) -> Tensor:
        ends = torch.tensor(self.lengths, device=columns.device).cumsum(0)
        return columns[0, ends - 1]

    def to(self, device: torch.device) -> PackedBatch:
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            kept=self.kept.to(device),
        )


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences in a rectangle, padded on the right."""

    tokens: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64
    response_lengths: Tensor  # [B] int64

    @classmethod
    def build(cls, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> PaddedBatch:
        """Pad to the longest."""
        rows = _rows(prompts, responses)
        return cls(
            tokens=pad_sequence(rows, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_lengths=torch.tensor([len(response) for response in responses]),
        )

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.tokens, "attention_mask": self.attention_mask}

    @property
    def kept(self) -> Tensor:
        end = max(self._first + 1, self.tokens.shape[1] - 1)
        return torch.arange(self._first, end, device=self.tokens.device)

    @property
    def labels(self) -> Tensor:
        return next_tokens(self.tokens)[:, self.kept]

    def responses(self, kept: Tensor) -> Tensor:
        steps = torch.arange(int(self.response_lengths.max()), device=kept.device)  # (T,)
        columns = (self.prompt_lengths - 1 - self._first)[:, None] + steps
        responses = kept.gather(1, columns.clamp(max=kept.shape[1] - 1))  # (B, T)
        return responses.masked_fill(steps >= self.response_lengths[:, None], 0.0)

    def last(self, columns: Tensor) -> Tensor:
        return columns.gather(1, self.attention_mask.sum(dim=1, keepdim=True) - 1).squeeze(1)

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(
            self.tokens.to(device),
            self.attention_mask.to(device),
            self.prompt_lengths.to(device),
            self.response_lengths.to(device),
        )

    @property
    def _first(self) -> int:
        """The first column that precedes a response token of any sequence."""
        return int(self.prompt_lengths.min()) - 1


def _rows(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[Tensor]:
    return [
        torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
