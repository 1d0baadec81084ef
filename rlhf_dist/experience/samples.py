"""The learner's view of a leased batch: flat token arrays, cut into batches a pass at a time.

Token columns come out of the Arrow buffers whole, never sample by sample, and stay in the order in which the
batches arrived. Samples are counted in the order (ordinal, sample), so that a step does not depend on who was
fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rlhf_dist.experience.schema import EXPERIENCE_SCHEMA, check_schema
from rlhf_dist.experience.sequences import SequenceBatch, sequence_batch

COLUMNS = (
    "ordinal",
    "sample",
    "oldest_version",
    "finish_reason",
    "prompt_tokens",
    "response_tokens",
    "response_mask",
    "rollout_logprobs",
    "reward",
    "reward_parts",
    "ref_logprobs",
)
"""What of the experience a learner step is made from; texts and times are not read."""


@dataclass(frozen=True)
class Samples:
    """A batch of B samples with N response tokens in all. Token arrays may be read-only.

    The response of sample i is `response_tokens[s : s + response_lengths[i]]` with s = `response_starts[i]`,
    and so for every array of N numbers; the same with its prompt.
    """

    prompt_tokens: np.ndarray  # [sum of prompt lengths] int32
    prompt_starts: np.ndarray  # [B] int64
    prompt_lengths: np.ndarray  # [B] int64
    response_tokens: np.ndarray  # [N] int32
    response_starts: np.ndarray  # [B] int64
    response_lengths: np.ndarray  # [B] int64
    response_mask: np.ndarray  # [N] uint8
    rollout_logprobs: np.ndarray  # [N] float32
    ref_logprobs: np.ndarray | None  # [N] float32
    oldest_versions: np.ndarray  # [B] int32: policy version that sampled a response's oldest token
    rewards: np.ndarray  # [B] float64
    ordinals: np.ndarray  # [B] int64
    finished: np.ndarray  # [B] bool: ended by itself, not cut at the token limit
    reward_parts: dict[str, np.ndarray]  # name -> [B] float64

    @classmethod
    def from_batches(cls, batches: Sequence[pa.RecordBatch]) -> Samples:
        """Put scored batches together; their tokens are copied once, where there is more than one batch."""
        for batch in batches:
            check_schema(batch.schema, EXPERIENCE_SCHEMA)
        columns = [batch.select(COLUMNS) for batch in batches]
        (batch,) = pa.Table.from_batches(columns).combine_chunks().to_batches()
        order = np.lexsort([batch["sample"].to_numpy(), batch["ordinal"].to_numpy()])
        prompt_starts, prompt_lengths = _places(batch["prompt_tokens"])
        response_starts, response_lengths = _places(batch["response_tokens"])
        ref_logprobs = _values(batch["ref_logprobs"])
        return cls(
            prompt_tokens=_values(batch["prompt_tokens"]),
            prompt_starts=prompt_starts[order],
            prompt_lengths=prompt_lengths[order],
            response_tokens=_values(batch["response_tokens"]),
            response_starts=response_starts[order],
            response_lengths=response_lengths[order],
            response_mask=_values(batch["response_mask"]),
            rollout_logprobs=_values(batch["rollout_logprobs"]),
            ref_logprobs=ref_logprobs if len(ref_logprobs) == response_lengths.sum() else None,
            oldest_versions=batch["oldest_version"].to_numpy()[order],
            rewards=batch["reward"].to_numpy()[order],
            ordinals=batch["ordinal"].to_numpy()[order],
            finished=pc.equal(batch["finish_reason"], "stop").to_numpy(zero_copy_only=False)[order],
            reward_parts={name: part[order] for name, part in _reward_parts(batch).items()},
        )

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.rewards)

    @property
    def num_response_tokens(self) -> int:
        """N."""
        return len(self.response_tokens)

    @property
    def total_lengths(self) -> list[int]:
        """[B] prompt and response tokens: what a forward pass costs."""
        return (self.prompt_lengths + self.response_lengths).tolist()

    def sequences(self, indices: Sequence[int], *, packed: bool) -> SequenceBatch:
        """The chosen samples as the input of one forward pass."""
        prompts = _slices(self.prompt_starts, self.prompt_lengths, indices)
        responses = _slices(self.response_starts, self.response_lengths, indices)
        return sequence_batch(
            [self.prompt_tokens[each] for each in prompts],
            [self.response_tokens[each] for each in responses],
            packed=packed,
        )

    def padded(self, flat: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A flat [N] per-token array as [B, T], zero beyond each response's end."""
        flat = np.asarray(flat)
        padded = np.zeros((self.num_samples, self.response_lengths.max()), flat.dtype)
        places = _slices(self.response_starts, self.response_lengths, range(self.num_samples))
        for row, place in zip(padded, places, strict=True):
            row[: place.stop - place.start] = flat[place]
        return torch.from_numpy(padded)

    def scatter(self, padded: torch.Tensor, indices: Sequence[int], *, into: torch.Tensor) -> None:
        """Write the rows of [B', T], one a chosen sample, to their places in a flat [N] array."""
        places = _slices(self.response_starts, self.response_lengths, indices)
        for row, place in zip(padded.cpu(), places, strict=False):  # without samples there is one idle row
            into[place] = row[: place.stop - place.start]


def _places(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """[B] int64 each: where in `_values` a list begins, and how long it is."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets[:-1] - offsets[0], np.diff(offsets)


def _values(column: pa.ListArray) -> np.ndarray:
    """All values of all lists."""
    return column.flatten().to_numpy()


def _slices(starts: np.ndarray, lengths: np.ndarray, indices: Sequence[int]) -> Iterator[slice]:
    """Where the chosen lists are."""
    chosen = list(indices)
    begins = starts[chosen]
    return map(slice, begins.tolist(), (begins + lengths[chosen]).tolist())


def _reward_parts(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """[B] by name; every sample has the same names."""
    column = batch["reward_parts"]
    names = [name for name, _ in column[0].as_py()]
    return {name: pc.map_lookup(column, name, "first").to_numpy() for name in names}
