"""What an iteration has to generate, and what whole and parts come to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.bench.iterations import compare, response_lengths, vowels


def step(since_start, *, tokens=100, **seconds):
    named = {f"seconds_{name}": value for name, value in seconds.items()}
    return {"seconds_since_start": since_start, "seconds_step": 9.0, "num_response_tokens": tokens} | named


def test_uniform_lengths_are_the_longest():
    assert response_lengths("uniform", 3, 64, seed=0) == [64, 64, 64]


def test_ragged_lengths_are_quantiles_in_an_order_of_the_seed():
    # 30 x (1 - sqrt(1 - q)) for q = 1/8, 3/8, 5/8, 7/8
    assert sorted(response_lengths("ragged", 4, 30, seed=0)) == [2, 6, 12, 19]
    many = response_lengths("ragged", 64, 64, seed=1)
    assert response_lengths("ragged", 64, 64, seed=1) == many != response_lengths("ragged", 64, 64, seed=2)
    assert sorted(many) == sorted(response_lengths("ragged", 64, 64, seed=2))
    assert sum(many) == 1367, "a third of 64 x 64 is 1365"


@given(st.integers(1, 300), st.integers(1, 2000), st.integers(0, 5))
def test_every_response_has_a_token_and_none_too_many(num_prompts, max_tokens, seed):
    lengths = response_lengths("ragged", num_prompts, max_tokens, seed=seed)
    assert len(lengths) == num_prompts
    assert 1 <= min(lengths) <= max(lengths) <= max_tokens


def test_whole_and_parts_are_medians_of_the_measured_iterations():
    steps = [
        step(9.0, rollout=8.0, learning=7.0),
        step(11.0, rollout=0.5, learning=1.0),
        step(14.0, rollout=0.7, learning=1.5),
        step(24.0, rollout=0.6, learning=1.2),
    ]
    bare_s = {"generation": [5.0, 0.5, 0.4, 0.6], "learning": [4.0, 1.0, 1.0, 1.0]}
    compared = compare(steps, bare_s, [3.0, 0.8, 0.9, 0.7], num_warmup=1)
    assert compared.whole_s == 3.0, "of 2, 3 and 10"
    assert compared.phases_s == {"rollout": 0.6, "learning": 1.2}
    assert compared.bare_s == {"generation": 0.5, "learning": 1.0}
    assert compared.loop_s == 0.8
    assert compared.loop_ratio == pytest.approx(1.5), "1.2 in the run"
    assert compared.parts_s == 1.5
    assert compared.ratio == 0.5
    assert compared.tokens_per_s == pytest.approx(33.333, abs=1e-3)
    assert compared.parts_tokens_per_s == pytest.approx(66.667, abs=1e-3)


def test_the_first_iteration_counts_from_the_start_where_nothing_is_warm_up():
    assert compare([step(4.0)], {"learning": [1.0]}, [1.0], num_warmup=0).whole_s == 4.0


def test_iterations_of_different_work_are_refused():
    with pytest.raises(ValueError, match=r"iterations of \[100, 101\] response tokens"):
        compare([step(1.0), step(2.0, tokens=101)], {}, [], num_warmup=0)


def test_the_built_in_reward_is_the_share_of_vowels():
    assert vowels(["p"] * 3, ["abe", "", "xyz"], {}) == [2 / 3, 0.0, 0.0]
