"""REINFORCE++: whitened returns by hand."""

from __future__ import annotations

import statistics

import pytest
import torch


def test_returns_are_whitened_over_the_tokens_of_the_batch(recipe, step_batch):
    estimates, metrics = recipe("reinforce_pp").estimate(step_batch())
    returns = [1.0] * 3 + [2.0] * 2 + [6.0] + [5.0] * 5
    mean, deviation = statistics.mean(returns), statistics.stdev(returns)
    white = [(each - mean) / deviation for each in (1.0, 2.0, 6.0, 5.0)]
    expected = [
        [white[0]] * 3,
        [white[1], white[1], 0],
        [white[2], 0, 0],
        [white[3], white[3], 0],
        [white[3]] * 3,
    ]
    torch.testing.assert_close(estimates.advantages, torch.tensor(expected))
    assert metrics["return_mean"] == pytest.approx(mean)
    assert metrics["advantage_std"] == pytest.approx(statistics.pstdev(returns), rel=1e-5)


def test_the_penalty_counts_from_its_token_backwards(recipe, step_batch):
    old = torch.zeros(5, 3)
    old[4, 1] = 2.0
    batch = step_batch(old_logprobs=old, ref_logprobs=torch.zeros(5, 3), rewards=torch.zeros(5))
    estimates, _ = recipe("reinforce_pp", gamma=0.5, kl={"coef": 1.0}).estimate(batch)
    returns = torch.zeros(5, 3)
    returns[4] = torch.tensor([-1.0, -2.0, 0.0])
    valid = returns[batch.mask]
    expected = torch.where(batch.mask, (returns - valid.mean()) / valid.std(), 0.0)
    torch.testing.assert_close(estimates.advantages, expected)


def test_the_mean_of_the_group_goes_first(recipe, step_batch):
    made = recipe("reinforce_pp", baseline="group_mean")
    estimates, _ = made.estimate(step_batch())
    tokens = [-2.0] * 3 + [-1.0] * 2 + [3.0] + [0.0] * 5
    mean, deviation = statistics.mean(tokens), statistics.stdev(tokens)
    first = [(each - mean) / deviation for each in (-2.0, -1.0, 3.0, 0.0, 0.0)]
    torch.testing.assert_close(estimates.advantages[:, 0], torch.tensor(first))


def test_only_the_group_mean_needs_a_group(recipe):
    assert recipe("reinforce_pp").settings.min_samples_per_prompt == 1
    assert recipe("reinforce_pp", baseline="group_mean").settings.min_samples_per_prompt == 2


def test_equal_returns_teach_nothing(recipe, step_batch):
    estimates, _ = recipe("reinforce_pp").estimate(step_batch(rewards=torch.full((5,), 0.1)))
    assert (estimates.advantages == 0).all()
