"""Iterations of PPO: what each has to generate, and what the seconds of whole and parts come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from rlhf_dist.data.shuffle import permutation

Lengths = Literal["uniform", "ragged"]
"""Of the responses of an iteration: every one the longest, or a third of that on average."""


@dataclass(frozen=True)
class Comparison:
    """Seconds of an iteration, each the median over the measured ones."""

    response_tokens: int
    """Of an iteration."""
    whole_s: float
    """From one step's end to the next."""
    phases_s: dict[str, float]
    """What the run's metrics say of it, by name without `seconds_`; they overlap."""
    bare_s: dict[str, float]
    """The parts, each alone in a process."""
    loop_s: float
    """Of `bare_s["learning"]` what DeepSpeed alone takes."""

    @property
    def parts_s(self) -> float:
        """All parts, one after the other."""
        return sum(self.bare_s.values())

    @property
    def loop_ratio(self) -> float:
        """A learner's step in the run to the same step of DeepSpeed alone."""
        return self.phases_s["learning"] / self.loop_s

    @property
    def tokens_per_s(self) -> float:
        """Response tokens a second of the whole."""
        return self.response_tokens / self.whole_s

    @property
    def parts_tokens_per_s(self) -> float:
        """Response tokens a second of parts that nothing comes between."""
        return self.response_tokens / self.parts_s

    @property
    def ratio(self) -> float:
        """Speed of the whole to that of its parts: 1 where nothing is lost, above 1 where parts overlap."""
        return self.parts_s / self.whole_s


def response_lengths(lengths: Lengths, num_prompts: int, max_tokens: int, *, seed: int) -> list[int]:
    """Response tokens for each prompt of an iteration.

    `ragged` ones are the quantiles of Beta(1, 2), whose mean is a third: the same set for any seed, which
    decides what prompt has which.
    """
    if lengths == "uniform":
        return [max_tokens] * num_prompts
    quantiles = (np.arange(num_prompts) + 0.5) / num_prompts
    shares = 1 - np.sqrt(1 - quantiles)
    tokens = np.maximum(1, np.rint(max_tokens * shares)).astype(int)
    return tokens[permutation(num_prompts, seed)].tolist()


def compare(
    steps: Sequence[Mapping[str, Any]],
    bare_s: Mapping[str, Sequence[float]],
    loop_s: Sequence[float],
    *,
    num_warmup: int,
) -> Comparison:
    """What a run and its parts took, the first `num_warmup` iterations of each left out.

    Args:
        steps: metrics of the run's steps, from the first on.
        bare_s: by part, seconds of each iteration.
        loop_s: seconds of each iteration that DeepSpeed alone takes of learning.

    Raises:
        ValueError: the iterations are not of the same number of response tokens.
    """
    whole_s = [now - before for before, now in pairwise([0.0, *(s["seconds_since_start"] for s in steps)])]
    tokens = {step["num_response_tokens"] for step in steps}
    if len(tokens) != 1:
        raise ValueError(f"iterations of {sorted(tokens)} response tokens cannot be compared")
    names = [name.removeprefix("seconds_") for name in steps[0] if _is_phase(name)]
    return Comparison(
        response_tokens=tokens.pop(),
        whole_s=statistics.median(whole_s[num_warmup:]),
        phases_s={
            name: statistics.median(step[f"seconds_{name}"] for step in steps[num_warmup:]) for name in names
        },
        bare_s={part: statistics.median(seconds[num_warmup:]) for part, seconds in bare_s.items()},
        loop_s=statistics.median(loop_s[num_warmup:]),
    )


def vowels(prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """A reward that costs next to nothing: the share of vowels among a response's characters."""
    del prompts, columns
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in responses]


def _is_phase(name: str) -> bool:
    return name.startswith("seconds_") and name not in ("seconds_step", "seconds_since_start")
