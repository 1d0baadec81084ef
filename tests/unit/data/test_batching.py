"""Batch plans: literal cases, and the properties that the learner relies on."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.batching import (
    Plan,
    RankBatches,
    balance,
    learner_plan,
    micro_batches,
    padding_share,
    split_to_count,
)

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def samples_of(ranks: RankBatches) -> list[int]:
    return sorted(flat(flat(ranks)))


def plan(lengths: list[int], **changes: int) -> Plan:
    arguments = {"num_ranks": 2, "num_epochs": 2, "num_minibatches": 1, "max_tokens_per_micro_batch": 100}
    return learner_plan(lengths, **{**arguments, "packed": True, "seed": 0, **changes})


def test_balance_gives_the_longest_first_to_the_emptiest_part() -> None:
    assert balance([7, 5, 4, 3, 1], 2) == [[0, 3], [1, 2, 4]]  # 10 and 10 tokens


def test_balance_spreads_equal_lengths_by_count() -> None:
    assert balance([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]


def test_balance_leaves_parts_empty_when_samples_run_out() -> None:
    assert balance([5], 3) == [[0], [], []]


def test_balance_needs_a_part() -> None:
    with pytest.raises(ValueError, match="num_parts=0"):
        balance([1], 0)


@given(LENGTHS, st.integers(1, 8))
def test_balance_covers_each_index_once_within_the_bound_of_greedy(lengths: list[int], parts: int) -> None:
    result = balance(lengths, parts)
    assert sorted(flat(result)) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in part) for part in result]
    assert max(totals) - min(totals) <= max(lengths)


def test_padded_micro_batches_group_neighbours_in_length() -> None:
    assert micro_batches([10, 50, 12, 48, 11, 12], 100, packed=False) == [[1, 3], [2, 5, 4], [0]]


def test_packed_micro_batches_fill_up_with_what_fits() -> None:
    assert micro_batches([10, 50, 12, 48, 38, 39], 100, packed=True) == [[1, 3], [5, 4, 2, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_a_sample_over_the_limit_stands_alone(packed: bool) -> None:
    assert micro_batches([10, 500, 10], 100, packed=packed) == [[1], [0, 2]]


def test_micro_batches_of_nothing() -> None:
    assert micro_batches([], 100, packed=True) == micro_batches([], 100, packed=False) == []


def test_micro_batches_need_a_token() -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        micro_batches([1], 0, packed=True)


@given(LENGTHS, st.integers(1, 500))
def test_padded_micro_batches_keep_the_limits_and_every_sample(lengths: list[int], max_tokens: int) -> None:
    batches = micro_batches(lengths, max_tokens, packed=False)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert padding_share(lengths, [batch]) <= 0.05 + 1e-9


@given(LENGTHS, st.integers(1, 500))
def test_packed_micro_batches_keep_the_limit_and_every_sample(lengths: list[int], max_tokens: int) -> None:
    batches = micro_batches(lengths, max_tokens, packed=True)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= max_tokens
        assert batch == sorted(batch, key=lambda index: (-lengths[index], index))
    fewest = -(-sum(lengths) // max_tokens)
    if max(lengths) <= max_tokens:
        assert len(batches) <= 2 * fewest  # of two groups, never are both at most half full


def test_split_to_count_halves_the_largest_and_then_adds_empty_ones() -> None:
    assert split_to_count([[1, 2, 3], [4]], 3) == [[1, 2], [3], [4]]
    assert split_to_count([[1, 2], [3]], 5) == [[1], [2], [3], [], []]
    assert split_to_count([], 2) == [[], []]


def test_split_to_count_does_not_merge() -> None:
    with pytest.raises(ValueError, match="2 micro-batches cannot become 1"):
        split_to_count([[1], [2]], 1)


@given(LENGTHS, st.integers(0, 60))
def test_split_to_count_keeps_samples_and_never_pads_more(lengths: list[int], extra: int) -> None:
    batches = micro_batches(lengths, 400, packed=False)
    result = split_to_count(batches, len(batches) + extra)
    assert len(result) == len(batches) + extra
    assert Counter(flat(result)) == Counter(flat(batches))
    assert padding_share(lengths, result) <= padding_share(lengths, batches)
    if [] in result:
        assert all(len(batch) <= 1 for batch in result)


def test_padding_share() -> None:
    assert padding_share([4, 2, 6], [[0, 1], [2]]) == pytest.approx(2 / 14)
    assert padding_share([3], [[0], []]) == 0.0
    assert padding_share([], []) == 0.0


def test_plan_for_one_rank_and_one_minibatch() -> None:
    result = plan([30, 60, 50, 20], num_ranks=1, num_epochs=1)
    assert result.forward == [[[1, 0], [2, 3]]]
    assert result.epochs == [[[[[1, 0], [2, 3]]]]]


@given(
    lengths=LENGTHS,
    num_ranks=st.integers(1, 5),
    num_epochs=st.integers(1, 3),
    max_tokens=st.integers(1, 400),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_plan_covers_each_sample_once_an_epoch_with_equal_counts(
    lengths: list[int], num_ranks: int, num_epochs: int, max_tokens: int, seed: int, data: st.DataObject
) -> None:
    num_minibatches, packed = data.draw(st.integers(1, len(lengths))), data.draw(st.booleans())
    result = learner_plan(
        lengths,
        num_ranks=num_ranks,
        num_epochs=num_epochs,
        num_minibatches=num_minibatches,
        max_tokens_per_micro_batch=max_tokens,
        packed=packed,
        seed=seed,
    )
    everything = list(range(len(lengths)))
    assert samples_of(result.forward) == everything
    assert len(result.epochs) == num_epochs
    for epoch in result.epochs:
        assert len(epoch) == num_minibatches
        assert sorted(flat([samples_of(ranks) for ranks in epoch])) == everything
        sizes = [len(samples_of(ranks)) for ranks in epoch]
        assert max(sizes) - min(sizes) <= 1
    for ranks in [result.forward, *chain.from_iterable(result.epochs)]:
        assert len(ranks) == num_ranks
        assert len({len(batches) for batches in ranks}) == 1
        for batch in flat(ranks):
            longest = max((lengths[sample] for sample in batch), default=0)
            cost = sum(lengths[sample] for sample in batch) if packed else len(batch) * longest
            assert len(batch) <= 1 or cost <= max_tokens
    share = result.padding_share(lengths, packed=packed)
    assert share == 0 if packed else share <= 0.05 + 1e-9


@given(LENGTHS, st.integers(2, 7), st.integers(0, 99))
def test_minibatches_are_the_same_for_any_number_of_ranks(
    lengths: list[int], num_ranks: int, seed: int
) -> None:
    minibatches = min(3, len(lengths))
    alone = plan(lengths, num_ranks=1, num_minibatches=minibatches, seed=seed)
    spread = plan(lengths, num_ranks=num_ranks, num_minibatches=minibatches, seed=seed)
    for one, many in zip(alone.epochs, spread.epochs, strict=True):
        assert [samples_of(ranks) for ranks in one] == [samples_of(ranks) for ranks in many]


@given(LENGTHS, st.integers(1, 5))
def test_a_single_minibatch_is_laid_out_as_the_forward_pass(lengths: list[int], num_ranks: int) -> None:
    """Then old and new log-probabilities come from the same batches, and first ratios are 1."""
    result = plan(lengths, num_ranks=num_ranks)
    assert result.epochs == [[result.forward], [result.forward]]


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    lengths = list(range(1, 33))
    first = plan(lengths, num_minibatches=4)
    assert first == plan(lengths, num_minibatches=4)
    assert first.epochs[0] != first.epochs[1]
    assert first.epochs != plan(lengths, num_minibatches=4, seed=1).epochs


def test_a_seed_may_be_of_several_numbers() -> None:
    arguments = {"num_ranks": 1, "num_epochs": 1, "num_minibatches": 4, "max_tokens_per_micro_batch": 64}
    steps = [learner_plan(range(1, 33), **arguments, packed=True, seed=(7, step)) for step in range(2)]
    assert steps[0].epochs != steps[1].epochs
    assert steps[0].forward == steps[1].forward


def test_more_minibatches_than_samples() -> None:
    with pytest.raises(ValueError, match="num_minibatches=4 for 3 samples"):
        plan([1, 2, 3], num_minibatches=4)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="num_minibatches=1 for 0 samples"):
        plan([])
