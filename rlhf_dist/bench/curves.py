"""Reward curves of runs, and what is read off them over seeds. Numbers only: no files, no processes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

REACHED_WINDOW = 3
"""Steps in a row whose mean must be at a reward to have reached it: one lucky batch does not count."""
FINAL_WINDOW = 5
"""Last steps that the final reward is the mean of."""


@dataclass(frozen=True)
class Curve:
    """The mean reward of each learner step of a run, all of the same number of samples."""

    rewards: tuple[float, ...]
    samples_per_step: int

    @property
    def samples(self) -> tuple[int, ...]:
        """What the policy that earned each reward had been trained on: 0 at the first step."""
        return tuple(step * self.samples_per_step for step in range(len(self.rewards)))


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    std: float | None
    """With N - 1; None for a single seed."""


@dataclass(frozen=True)
class Summary:
    """Runs of one algorithm that differ in the seed only."""

    num_runs: int
    num_failed: int
    """Without a curve; the figures below are of the others."""
    num_degenerate: int
    num_reached: int
    samples_to_reach: Spread | None
    """Of the runs that reached the reward; None: none did."""
    mean_reward: Spread | None
    final_reward: Spread | None
    worst_final_reward: float | None


def samples_to_reach(curve: Curve, reward: float) -> int | None:
    """Samples trained on when the mean of `REACHED_WINDOW` steps in a row is first at least `reward`.

    None: it never is. It is counted to the last step of the window.
    """
    for end in range(REACHED_WINDOW, len(curve.rewards) + 1):
        if statistics.fmean(curve.rewards[end - REACHED_WINDOW : end]) >= reward:
            return curve.samples[end - 1]
    return None


def mean_reward(curve: Curve) -> float:
    """Of all samples of the run: the area under the curve over its width. Early learners have more."""
    return statistics.fmean(curve.rewards)


def final_reward(curve: Curve) -> float:
    """Mean of the last `FINAL_WINDOW` steps."""
    return statistics.fmean(curve.rewards[-FINAL_WINDOW:])


def is_degenerate(curve: Curve) -> bool:
    """Whether the run ended no better than it began."""
    return final_reward(curve) <= curve.rewards[0]


def summarize(curves: Sequence[Curve | None], *, reward: float) -> Summary:
    """What an algorithm's runs, one a seed, come to.

    Args:
        curves: None for a run that failed.
        reward: what `samples_to_reach` asks for.
    """
    whole = [curve for curve in curves if curve is not None]
    reached = [samples for curve in whole if (samples := samples_to_reach(curve, reward)) is not None]
    final = [final_reward(curve) for curve in whole]
    return Summary(
        num_runs=len(curves),
        num_failed=len(curves) - len(whole),
        num_degenerate=sum(is_degenerate(curve) for curve in whole),
        num_reached=len(reached),
        samples_to_reach=spread(reached),
        mean_reward=spread([mean_reward(curve) for curve in whole]),
        final_reward=spread(final),
        worst_final_reward=min(final, default=None),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None without values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
