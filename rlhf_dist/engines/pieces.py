"""What the updates of a step work on, and the pieces of it that one forward pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_dist.algorithms.base import Estimates, MicroBatch, Stats, StepBatch
from rlhf_dist.algorithms.parts.correction import Correction
from rlhf_dist.data.batching import RankBatches
from rlhf_dist.experience.samples import Samples


@dataclass(frozen=True)
class StepData:
    """A step's batch with everything that was computed of it as a whole. The same on every rank."""

    samples: Samples
    batch: StepBatch
    estimates: Estimates
    correction: Correction

    def counts(self, minibatch: RankBatches) -> tuple[int, int]:
        """Valid tokens of a minibatch over all ranks, and its samples that have one."""
        everywhere = [index for rank in minibatch for micro in rank for index in micro]
        tokens_by_sample = self.batch.mask[everywhere].sum(dim=1)
        return int(tokens_by_sample.sum()), int((tokens_by_sample > 0).sum())

    def piece(self, indices: Sequence[int], num_tokens: int, num_sequences: int) -> MicroBatch:
        """The chosen rows, no wider than the longest response among them.

        Args:
            num_tokens, num_sequences: `counts` of the minibatch.
        """
        rows = list(indices)
        width = int(self.samples.response_lengths[rows].max(initial=0))

        def cut(whole: torch.Tensor | None) -> torch.Tensor | None:
            return None if whole is None else whole[rows, :width]

        return MicroBatch(
            mask=self.batch.mask[rows, :width],
            old_logprobs=self.correction.old_logprobs[rows, :width],
            advantages=self.estimates.advantages[rows, :width],
            old_values=cut(self.batch.values),
            returns=cut(self.estimates.returns),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            weights=cut(self.correction.weights),
            ref_logprobs=cut(self.batch.ref_logprobs),
        )


def named(model: str, loss: torch.Tensor, stats: Stats, micro: MicroBatch) -> Stats:
    """Metrics of one piece; its share of the minibatch's loss becomes a mean over its own tokens."""
    share = micro.mask.sum().clamp(min=1) / micro.num_tokens
    return {f"{model}_{name}": value for name, value in stats.items()} | {
        f"{model}_loss": loss.detach() / share
    }
