"""Who generates which prompt: literal cases, and that nobody gets more than the room it has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.experience.dispatch import WorkerLoad, assign


def test_idle_workers_take_turns():
    loads = [WorkerLoad(index, 0, 64, 8) for index in range(2)]
    assert assign([5, 6, 7, 8, 9], loads) == {0: [5, 7, 9], 1: [6, 8]}


def test_the_one_with_the_fewest_tokens_to_come_is_next():
    loads = [WorkerLoad(0, 200, 64, 8), WorkerLoad(1, 100, 64, 8), WorkerLoad(2, 1000, 64, 8)]
    assert assign([1, 2, 3, 4], loads) == {1: [1, 2, 4], 0: [3]}


def test_a_full_worker_gets_none():
    assert assign([1, 2, 3], [WorkerLoad(0, 0, 64, 1), WorkerLoad(1, 500, 64, 4)]) == {0: [1], 1: [2, 3]}


def test_more_prompts_than_room():
    with pytest.raises(ValueError, match="2 prompts for workers with less room"):
        assign([1, 2], [WorkerLoad(0, 0, 64, 1)])


@given(st.data(), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 9)), min_size=1, max_size=5))
def test_every_prompt_goes_to_one_worker_within_its_room(data, sizes):
    loads = [WorkerLoad(index, tokens, 50, room) for index, (tokens, room) in enumerate(sizes)]
    ordinals = list(range(data.draw(st.integers(0, sum(load.room for load in loads)))))
    assigned = assign(ordinals, loads)
    assert sorted(ordinal for mine in assigned.values() for ordinal in mine) == ordinals
    assert all(len(mine) <= loads[index].room for index, mine in assigned.items())
