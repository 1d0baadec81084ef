"""Rewards from Python functions: finding them, calling them, and checking what they return."""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf_dist.errors import ConfigError, RewardError

NOT_LISTS = (str, bytes, dict, set, frozenset)
"""Iterable, but not one number a sample in the samples' order: keys, characters or no order at all."""

RewardFunction = Callable[[list[str], list[str], dict[str, list[Any]]], Sequence[float]]


def load_function(path: str) -> RewardFunction:
    """Import `package.module:function`.

    Raises:
        ConfigError: the module or the function is not there, or the module raised.
    """
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"reward function {path!r}: module {module_name!r} cannot be imported ({error}); "
            "it must be installed, or lie under the folder that the run is started from"
        ) from error
    except Exception as error:  # whatever a user's module may raise
        raise ConfigError(
            f"reward function {path!r}: importing module {module_name!r} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"reward function {path!r}: module {module_name!r} has no function {function_name!r}"
        )
    return function


def call_function(
    path: str,
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
) -> list[float]:
    """Call a reward function on a batch of samples.

    Raises:
        RewardError: it raised, or did not return one finite number a sample.
    """
    try:
        scores = function(prompts, responses, columns)
        if isinstance(scores, Iterator):  # what a generator raises is the function's doing, too
            scores = list(scores)
    except Exception as error:  # whatever a user's code may raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward function {path!r} raised {type(error).__name__}: {error} "
            f"({place.filename} line {place.lineno}), on a batch of {len(responses)} samples"
        ) from error
    return check_scores(f"reward function {path!r}", scores, len(responses))


def check_scores(what: str, scores: Any, num_samples: int) -> list[float]:
    """The scores as floats.

    Raises:
        RewardError: there is not one finite number a sample.
    """
    try:
        if isinstance(scores, NOT_LISTS):
            raise TypeError
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{what} must return a list of numbers, one a sample; it returned {scores!r}"
        ) from error
    if len(numbers) != num_samples:
        raise RewardError(f"{what} returned {len(numbers)} scores for {num_samples} samples")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            raise RewardError(
                f"{what} returned {number} for sample {index} of its batch; scores must be finite"
            )
    return numbers


def weighted_sum(parts: dict[str, list[float]], weights: dict[str, float], num_samples: int) -> list[float]:
    """The reward of each sample: the sum of its parts, each times its weight."""
    return [sum(weights[name] * scores[i] for name, scores in parts.items()) for i in range(num_samples)]
