"""Plans which rank computes which samples in which micro-batch: lists of ints in, lists of ints out.

Everything is deterministic and knows no tensors. All ranks get the same number of micro-batches,
since ZeRO's collectives run inside each; a rank with nothing left gets empty ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from rlhf_dist.data.shuffle import permutation

MicroBatch = list[int]
"""Sample indices of one forward pass; empty: the rank takes part with a zero loss."""

MAX_PADDING_SHARE = 0.05
"""Padding in a padded micro-batch, at most."""

RankBatches = list[list[MicroBatch]]
"""[rank][micro-batch]: what each rank computes; the same count for every rank."""


@dataclass(frozen=True)
class Plan:
    """One learner step. Samples are indices into the step's batch."""

    forward: RankBatches
    """The pass without gradients over the whole batch (values, log-probabilities), gathered by the caller."""

    epochs: list[list[RankBatches]]
    """[epoch][minibatch][rank][micro-batch]: one optimizer step a minibatch."""

    def padding_share(self, lengths: Sequence[int], *, packed: bool) -> float:
        """Share of the step's computed tokens that are padding."""
        if packed:
            return 0.0
        passes = chain([self.forward], chain.from_iterable(self.epochs))
        return padding_share(lengths, [batch for ranks in passes for rank in ranks for batch in rank])


def learner_plan(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    num_epochs: int,
    num_minibatches: int,
    max_tokens_per_micro_batch: int,
    packed: bool,
    seed: int | tuple[int, ...],
) -> Plan:
    """Every epoch covers each sample once; minibatches are of equal size, or differ by one sample.

    Which samples form a minibatch follows from (seed, epoch) and never from `num_ranks`, so that
    the same step is computed on any number of ranks; hence a rank has other samples in each
    minibatch. A tuple, such as (run seed, step), gives each step shuffles of its own. `packed`: see
    `micro_batches`.
    """
    if not 1 <= num_minibatches <= len(lengths):
        raise ValueError(
            f"num_minibatches={num_minibatches} for {len(lengths)} samples: each minibatch needs at least one"
        )
    key = (seed,) if isinstance(seed, int) else seed

    def spread(unordered: Sequence[int]) -> RankBatches:
        samples = sorted(unordered)
        parts = _taken(samples, balance([lengths[sample] for sample in samples], num_ranks))
        return _cut_evenly(parts, lengths, max_tokens_per_micro_batch, packed=packed)

    return Plan(
        forward=spread(range(len(lengths))),
        epochs=[
            [spread(part) for part in _cut(permutation(len(lengths), *key, epoch).tolist(), num_minibatches)]
            for epoch in range(num_epochs)
        ],
    )


def balance(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of `lengths` split into `num_parts` with totals close to each other, each part ascending.

    Longest first, each to the part with the smallest total (then the fewest samples): at most 4/3
    of the best possible maximum (Graham 1969), and far closer where parts hold many samples.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts={num_parts}: at least one part is needed")
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    heap = [(0, 0, part) for part in range(num_parts)]  # (tokens, samples, part)
    for index in _longest_first(lengths):
        tokens, samples, part = heap[0]
        parts[part].append(index)
        heapq.heapreplace(heap, (tokens + lengths[index], samples + 1, part))
    return [sorted(part) for part in parts]


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[MicroBatch]:
    """Indices of `lengths` grouped so that a group computes at most `max_tokens`, each longest first.

    A sample longer than `max_tokens` forms a group of its own, over the limit.

    Args:
        packed: whether a group costs the sum of its lengths, or the number of samples times the longest, of
            which at most `MAX_PADDING_SHARE` is then padding.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: a micro-batch holds at least one token")
    return _packs(lengths, max_tokens) if packed else _rectangles(lengths, max_tokens)


def _packs(lengths: Sequence[int], max_tokens: int) -> list[MicroBatch]:
    """First fit, longest first: at most 11/9 of the fewest possible groups, and one (Johnson 1973)."""
    batches: list[MicroBatch] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        place = next((place for place, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            batches.append([])
            room.append(max_tokens)
            place = len(batches) - 1
        batches[place].append(index)
        room[place] -= lengths[index]
    return batches


def _rectangles(lengths: Sequence[int], max_tokens: int) -> list[MicroBatch]:
    """Neighbours in length together, as many as the limits allow."""
    batches: list[MicroBatch] = []
    used = 0  # tokens of the last batch
    for index in _longest_first(lengths):
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        used += lengths[index]
        if batches and padded <= max_tokens and used >= (1 - MAX_PADDING_SHARE) * padded:
            batches[-1].append(index)
        else:
            batches.append([index])
            used = lengths[index]
    return batches


def split_to_count(batches: Sequence[MicroBatch], count: int) -> list[MicroBatch]:
    """Exactly `count` micro-batches of the same samples: halves the largest, then appends empty ones."""
    if len(batches) > count:
        raise ValueError(f"{len(batches)} micro-batches cannot become {count}: they are only ever split")
    result = [list(batch) for batch in batches]
    while len(result) < count and any(len(batch) > 1 for batch in result):
        largest = max(range(len(result)), key=lambda place: len(result[place]))
        half = (len(result[largest]) + 1) // 2
        result[largest : largest + 1] = [result[largest][:half], result[largest][half:]]
    return result + [[] for _ in range(count - len(result))]


def padding_share(lengths: Sequence[int], batches: Sequence[MicroBatch]) -> float:
    """Share of padding among the padded tokens of `batches`, from 0 to 1."""
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches if batch)
    used = sum(lengths[index] for batch in batches for index in batch)
    return 1 - used / padded if padded else 0.0


def _cut_evenly(
    parts: Sequence[Sequence[int]], lengths: Sequence[int], max_tokens: int, *, packed: bool
) -> RankBatches:
    """Each rank's samples in micro-batches, of which every rank gets the same number."""
    ranks = [
        _taken(part, micro_batches([lengths[sample] for sample in part], max_tokens, packed=packed))
        for part in parts
    ]
    count = max(len(batches) for batches in ranks)
    return [split_to_count(batches, count) for batches in ranks]


def _taken(samples: Sequence[int], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of places in `samples`, as groups of samples."""
    return [[samples[place] for place in group] for group in groups]


def _cut(samples: Sequence[int], num_parts: int) -> list[Sequence[int]]:
    """Consecutive parts whose sizes differ by at most one."""
    borders = [len(samples) * part // num_parts for part in range(num_parts + 1)]
    return [samples[start:end] for start, end in pairwise(borders)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
