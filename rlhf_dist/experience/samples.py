"""The learner's view of a leased batch: flat token arrays with offsets, cut into batches a pass at a time.

Token columns come out of the Arrow buffers whole, never sample by sample. The order is (ordinal, sample),
whatever order the batches arrived in, so that a step does not depend on who was fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rlhf_dist.experience.schema import check_version
from rlhf_dist.experience.sequences import SequenceBatch, sequence_batch


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
    policy_versions: np.ndarray  # [N] int32: version that sampled the token
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
        table = pa.Table.from_batches(batches)
        order = np.lexsort([table["sample"].to_numpy(), table["ordinal"].to_numpy()])
        prompts = _Lists(batches, "prompt_tokens", order)
        responses = _Lists(batches, "response_tokens", order)
        num_ref_logprobs = sum(len(batch["ref_logprobs"].flatten()) for batch in batches)
        has_reference = num_ref_logprobs == responses.offsets[-1]
        return cls(
            prompt_tokens=prompts.values("prompt_tokens"),
            prompt_offsets=prompts.offsets,
            response_tokens=responses.values("response_tokens"),
            response_offsets=responses.offsets,
            response_mask=responses.values("response_mask"),
            rollout_logprobs=responses.values("rollout_logprobs"),
            policy_versions=_versions_by_token(batches, order),
            ref_logprobs=responses.values("ref_logprobs") if has_reference else None,
            rewards=table["reward"].to_numpy()[order],
            ordinals=table["ordinal"].to_numpy()[order],
            finished=pc.equal(table["finish_reason"], "stop").to_numpy()[order],
            reward_parts={name: part[order] for name, part in _reward_parts(table).items()},
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

    def sequences(self, indices: Sequence[int], *, packed: bool) -> SequenceBatch:
        """The chosen samples as the input of one forward pass."""
        prompts = [self.prompt_tokens[self.prompt_offsets[i] : self.prompt_offsets[i + 1]] for i in indices]
        responses = [
            self.response_tokens[self.response_offsets[i] : self.response_offsets[i + 1]] for i in indices
        ]
        return sequence_batch(prompts, responses, packed=packed)

    def padded(self, flat: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A flat [N] per-token array as [B, T], zero beyond each response's end."""
        pieces = torch.as_tensor(flat).split(self.response_lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)

    def scatter(self, padded: torch.Tensor, indices: Sequence[int], *, into: torch.Tensor) -> None:
        """Write the rows of [B', T], one a chosen sample, to their places in a flat [N] array."""
        for row, i in zip(padded.cpu(), indices, strict=False):  # a batch without samples has one idle row
            into[self.response_offsets[i] : self.response_offsets[i + 1]] = row[: self.response_lengths[i]]


class _Lists:
    """List columns whose lists are equally long in each row, of several batches, put into another order."""

    def __init__(self, batches: Sequence[pa.RecordBatch], column: str, order: np.ndarray) -> None:
        """Work out what is to be copied where.

        Args:
            column: one of them.
            order: [B] rows of the batches taken together.
        """
        self._batches = batches
        offsets = [batch[column].offsets.to_numpy() for batch in batches]
        starts = np.concatenate([each[:-1] - each[0] for each in offsets])[order]
        ends = np.concatenate([each[1:] - each[0] for each in offsets])[order]
        batch_of = np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches])[order]
        # Lists that are neighbours before and after are copied together.
        apart = (starts[1:] != ends[:-1]) | (batch_of[1:] != batch_of[:-1])
        first = np.flatnonzero(np.append(True, apart))
        last = np.append(first[1:], len(order)) - 1
        pieces = (batch_of[first], starts[first], ends[last])
        self._pieces = list(zip(*(each.tolist() for each in pieces), strict=True))
        self.offsets = np.append(0, np.cumsum(ends - starts, dtype=np.int64))  # [B + 1]

    def values(self, column: str) -> np.ndarray:
        """All values of a column, one list after the other, each copied once."""
        return self.gather([batch[column].flatten().to_numpy() for batch in self._batches])

    def gather(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The same of numbers made from what each batch's lists hold, one of each."""
        return np.concatenate([values[batch][start:end] for batch, start, end in self._pieces])


def _versions_by_token(batches: Sequence[pa.RecordBatch], order: np.ndarray) -> np.ndarray:
    """[N] int32, from the responses' spans, which cover all of their tokens in order."""
    spans = _Lists(batches, "version_spans", order)
    values = [batch["version_spans"].flatten() for batch in batches]
    versions, starts, ends = (
        spans.gather([each.field(name).to_numpy() for each in values]) for name in ("version", "start", "end")
    )
    return np.repeat(versions, ends - starts)


def _reward_parts(table: pa.Table) -> dict[str, np.ndarray]:
    """[B] by name; every sample has the same names."""
    column = table["reward_parts"]
    names = [name for name, _ in column[0].as_py()]
    return {name: pc.map_lookup(column, name, "first").to_numpy() for name in names}
