"""Rewards from Python functions: finding them, calling them, and checking what they return."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from rlhf_dist.errors import ConfigError, RewardError, RewardTimeoutError
from rlhf_dist.rewards.deadline import HelperThread, called

NOT_LISTS = (str, bytes, dict, set, frozenset)
"""Iterable, but not one number a sample in the samples' order: keys, characters or no order at all."""
LARGEST = float(np.finfo(np.float32).max)
"""Learning computes in float32."""
MAX_QUOTED = 300
"""Characters of what a reward raised or returned that a message quotes."""

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


class FunctionCaller:
    """Calls one reward function, each time within its deadline."""

    def __init__(self, path: str, function: RewardFunction, timeout_s: float | None) -> None:
        """Take note of the function that `load_function` found.

        Args:
            timeout_s: seconds that one call may take. None: no limit, and no thread of its own for the calls.
        """
        self._what, self._function = f"reward function {path!r}", function
        self._timeout_s = timeout_s
        self._thread: HelperThread[Any] | None = None
        if timeout_s is not None:
            self._thread = HelperThread(self._what)

    def __call__(
        self, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]
    ) -> list[float]:
        """The scores of a batch of samples.

        Raises:
            RewardTimeoutError: the function did not return in time; its thread is lost.
            RewardError: it raised anything, or did not return one finite number a sample.
        """

        def call() -> Any:
            scores = self._function(prompts, responses, columns)
            # what a generator raises, and the time that it takes, are the function's doing, too
            return list(scores) if isinstance(scores, Iterator) else scores

        future = self._within_deadline(call, len(responses))
        try:
            scores = future.result()
        except BaseException as error:  # whatever a user's code may raise, and only that: it is done by now
            raise RewardError(f"{self._what} {raised(error, len(responses))}") from error
        return check_scores(self._what, scores, len(responses))

    def _within_deadline(self, call: Callable[[], Any], num_samples: int) -> Future[Any]:
        if self._thread is None or self._timeout_s is None:
            return called(call)
        future = self._thread.called(call, self._timeout_s)
        if not future.done():
            raise RewardTimeoutError(
                f"{self._what} did not return within {self._timeout_s:g} s, {_on(num_samples)}; "
                "raise reward.timeout_s if it may take longer"
            )
        return future


def raised(error: BaseException, num_samples: int) -> str:
    """`raised KeyError: 'colour' (rewards.py line 7), on a batch of 8 samples`, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    quoted = _quoted(f"{type(error).__name__}: {error}")
    return f"raised {quoted} ({place.filename} line {place.lineno}), {_on(num_samples)}"


def check_scores(what: str, scores: Any, num_samples: int) -> list[float]:
    """The scores as floats.

    Raises:
        RewardError: there is not one finite number a sample.
    """
    try:
        if isinstance(scores, NOT_LISTS):
            raise TypeError
        numbers = [float(score) for score in scores]
    except Exception as error:  # whatever a user's objects may raise
        raise RewardError(
            f"{what} must return a list of numbers, one a sample; it returned {_quoted(repr(scores))}"
        ) from error
    if len(numbers) != num_samples:
        raise RewardError(
            f"{what} returned {_count(len(numbers), 'score')} for {_count(num_samples, 'sample')}"
        )
    for index, number in enumerate(numbers):
        if not is_finite(number):
            which = f" for sample {index} of its batch" if num_samples > 1 else ""
            raise RewardError(f"{what} returned {number}{which}; scores must be finite, in float32")
    return numbers


def is_finite(score: float) -> bool:
    """Whether a score is one that learning can use."""
    return abs(score) <= LARGEST


def weighted_sum(parts: dict[str, list[float]], weights: dict[str, float], num_samples: int) -> list[float]:
    """The reward of each sample: the sum of its parts, each times its weight."""
    return [sum(weights[name] * scores[i] for name, scores in parts.items()) for i in range(num_samples)]


def _quoted(text: str) -> str:
    """In one line, not too long, that every file and terminal takes: half a surrogate pair is escaped."""
    line = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return line if len(line) <= MAX_QUOTED else line[:MAX_QUOTED] + "…"


def _on(num_samples: int) -> str:
    return f"on a batch of {_count(num_samples, 'sample')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
