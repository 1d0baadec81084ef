"""What is read off reward curves, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.bench.curves import (
    Curve,
    Spread,
    final_reward,
    is_degenerate,
    mean_reward,
    samples_to_reach,
    spread,
    summarize,
)

LEARNED = Curve((0.4, 0.5, 0.6, 0.9, 0.9, 0.6, 0.9, 1.0), samples_per_step=64)
LEVEL = Curve((0.5, 0.4, 0.6, 0.5, 0.5), samples_per_step=64)
FELL = Curve((0.5, 0.2, 0.0, 0.0, 0.0, 0.0), samples_per_step=64)


def test_the_first_step_is_of_a_policy_that_was_trained_on_nothing():
    assert LEVEL.samples == (0, 64, 128, 192, 256)


@pytest.mark.parametrize(
    ("reward", "samples"),
    [
        (0.5, 128),  # 0.4, 0.5, 0.6
        (0.65, 192),  # 0.5, 0.6, 0.9
        (0.79, 256),  # 0.6, 0.9, 0.9
        (0.83, 448),  # 0.6, 0.9, 1.0 give 0.8333; before that two steps at 0.9 are not enough
        (0.84, None),
    ],
)
def test_a_reward_is_reached_when_three_steps_in_a_row_have_it_as_their_mean(reward, samples):
    assert samples_to_reach(LEARNED, reward) == samples


def test_two_steps_reach_nothing():
    assert samples_to_reach(Curve((1.0, 1.0), 64), 0.1) is None


def test_the_mean_reward_is_that_of_all_samples():
    assert mean_reward(LEARNED) == pytest.approx(5.8 / 8)


def test_the_final_reward_is_that_of_the_last_five_steps():
    assert final_reward(LEARNED) == pytest.approx(4.3 / 5)
    assert final_reward(Curve((0.2, 0.6), 64)) == pytest.approx(0.4)


@pytest.mark.parametrize(("curve", "degenerate"), [(LEARNED, False), (LEVEL, True), (FELL, True)])
def test_a_run_that_ends_no_better_than_it_began_is_degenerate(curve, degenerate):
    assert is_degenerate(curve) is degenerate


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([3.0], Spread(3.0, None)), ([1.0, 2.0, 3.0], Spread(2.0, 1.0))],
)
def test_the_spread_divides_by_one_less_than_the_count(values, expected):
    assert spread(values) == expected


def test_a_summary_counts_what_failed_what_fell_and_what_reached_the_reward():
    summary = summarize([LEARNED, None, FELL], reward=0.79)
    assert (summary.num_runs, summary.num_failed, summary.num_degenerate, summary.num_reached) == (3, 1, 1, 1)
    assert summary.samples_to_reach == Spread(256.0, None)
    assert summary.mean_reward.mean == pytest.approx((0.725 + 0.7 / 6) / 2)
    assert summary.final_reward.mean == pytest.approx((0.86 + 0.04) / 2)
    assert summary.final_reward.std == pytest.approx(0.82 / 2**0.5)
    assert summary.worst_final_reward == pytest.approx(0.04)


def test_a_summary_of_failures_has_no_figures():
    summary = summarize([None, None], reward=0.8)
    assert (summary.num_runs, summary.num_failed, summary.num_degenerate, summary.num_reached) == (2, 2, 0, 0)
    assert summary.samples_to_reach is summary.mean_reward is summary.final_reward is None
    assert summary.worst_final_reward is None


REWARDS = st.lists(st.floats(0, 1), min_size=3, max_size=30).map(lambda rewards: Curve(tuple(rewards), 8))


@given(REWARDS, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_reward_never_takes_fewer_samples(curve, one, other):
    low, high = sorted((one, other))
    first, second = samples_to_reach(curve, low), samples_to_reach(curve, high)
    assert second is None or (first is not None and first <= second)
