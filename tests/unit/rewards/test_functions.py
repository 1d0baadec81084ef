"""Reward functions: how they are found, and that nothing but one finite number a sample gets through."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.errors import ConfigError, RewardError, RewardTimeoutError
from rlhf_dist.rewards.functions import FunctionCaller, check_scores, load_function, weighted_sum

PROMPTS, RESPONSES, COLUMNS = ["p", "q"], ["one", "three"], {"answer": [1, 2]}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported until the test ends."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    return write


def call(function, timeout_s=None):
    return FunctionCaller("my_rewards:score", function, timeout_s)(PROMPTS, RESPONSES, COLUMNS)


def returning(scores):
    return call(lambda *_: scores)


# -------------------------------------------------------------------------------------- load_function


def test_a_function_is_found_by_its_path(module):
    module(
        "found_rewards", "def length(prompts, responses, columns):\n    return [len(r) for r in responses]\n"
    )
    assert load_function("found_rewards:length")([], ["abc"], {}) == [3]


def test_a_function_is_found_in_a_package():
    assert load_function("os.path:join")("a", "b") == "a/b"


def test_a_missing_module_is_named_with_the_remedy():
    message = (
        r"^reward function 'no_such_rewards:score': module 'no_such_rewards' cannot be imported "
        r"\(No module named 'no_such_rewards'\); it must be installed, or lie under the folder"
    )
    with pytest.raises(ConfigError, match=message):
        load_function("no_such_rewards:score")


def test_a_missing_dependency_of_the_module_is_the_one_that_is_named(module):
    module("needy_rewards", "import no_such_dependency\n")
    with pytest.raises(ConfigError, match=r"\(No module named 'no_such_dependency'\)"):
        load_function("needy_rewards:score")


@pytest.mark.parametrize(
    ("name", "source", "cause"),
    [
        ("untidy_rewards", "def score(:\n", "SyntaxError"),
        ("undefined_rewards", "x = undefined_name\n", "NameError: name 'undefined_name' is not defined"),
    ],
)
def test_a_module_that_raises_is_an_error_of_the_configuration(name, source, cause, module):
    module(name, source)
    with pytest.raises(ConfigError, match=f"^reward function '{name}:score': importing .* raised {cause}"):
        load_function(f"{name}:score")


@pytest.mark.parametrize("function", ["absent", "a_number", ""])
def test_what_is_not_there_or_no_function_is_refused(function, module):
    module("odd_rewards", "a_number = 3\n")
    with pytest.raises(ConfigError, match=f"module 'odd_rewards' has no function '{function}'"):
        load_function(f"odd_rewards:{function}")


# ------------------------------------------------------------------------------------- FunctionCaller


def test_the_function_gets_prompts_responses_and_columns():
    received = []

    def score(prompts, responses, columns):
        received.append((prompts, responses, columns))
        return [len(response) for response in responses]

    assert call(score) == [3.0, 5.0]
    assert received == [(["p", "q"], ["one", "three"], {"answer": [1, 2]})]


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0.5],
        (1, 0.5),
        [True, 0.5],
        np.array([1, 0.5]),
        np.array([1, 0.5], np.float32),
        torch.tensor([1, 0.5]),
        torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [torch.tensor(1), np.float64(0.5)],
        (score for score in (1, 0.5)),
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_any_sequence_of_numbers_becomes_a_list_of_floats(scores):
    result = returning(scores)
    assert result == [1.0, 0.5]
    assert {type(number) for number in result} == {float}


@pytest.mark.parametrize("timeout_s", [None, 60])
def test_what_a_function_raises_is_named_with_its_line(timeout_s):
    def score(_prompts, _responses, columns):
        return columns["colour"]

    line = score.__code__.co_firstlineno + 1
    message = (
        r"^reward function 'my_rewards:score' raised KeyError: 'colour' "
        rf"\(.*test_functions\.py line {line}\), on a batch of 2 samples$"
    )
    with pytest.raises(RewardError, match=message) as caught:
        call(score, timeout_s)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_message_has_one_line_however_much_was_raised_or_returned():
    def score(*_):
        raise ValueError("no\nsuch  colour " + "x" * 10_000)

    with pytest.raises(RewardError, match=r"raised ValueError: no such colour x{200,300}… \(") as caught:
        call(score)
    assert len(str(caught.value)) < 700
    with pytest.raises(RewardError, match=r"; it returned '\{\{+…$"):
        returning("{" * 10_000)


def test_a_message_can_be_written_whatever_was_raised():
    def score(*_):
        raise ValueError("half a pair: \ud800")

    with pytest.raises(RewardError) as caught:
        call(score)
    assert r"raised ValueError: half a pair: \ud800 (" in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("timeout_s", [None, 60.0])
@pytest.mark.parametrize("error", [SystemExit("done"), KeyboardInterrupt("done")])
def test_a_function_that_would_end_the_process_has_raised(error, timeout_s):
    def score(*_):
        raise error

    with pytest.raises(RewardError, match=f"raised {type(error).__name__}: done"):
        call(score, timeout_s=timeout_s)


def test_a_function_that_does_not_return_in_time_is_left_behind():
    release = threading.Event()
    with pytest.raises(
        RewardTimeoutError,
        match=(
            r"^reward function 'my_rewards:score' did not return within 0\.05 s, on a batch of 2 samples; "
            r"raise reward\.timeout_s"
        ),
    ):
        call(lambda *_: release.wait(60), timeout_s=0.05)
    release.set()


def test_a_generator_that_does_not_end_in_time_is_left_behind():
    release = threading.Event()

    def score(_prompts, responses, _columns):
        for response in responses:
            release.wait(60)
            yield len(response)

    with pytest.raises(RewardTimeoutError):
        call(score, timeout_s=0.05)
    release.set()


def test_calls_with_a_deadline_share_a_thread_and_others_have_none():
    def score(*_):
        threads.append(threading.current_thread())
        return [0.0, 0.0]

    threads = []
    for timeout_s in (60, None):
        caller = FunctionCaller("my_rewards:score", score, timeout_s)
        for _ in range(2):
            assert caller(PROMPTS, RESPONSES, COLUMNS) == [0.0, 0.0]
    first, second, *plain = threads
    assert first is second is not threading.main_thread()
    assert first.daemon
    assert plain == [threading.current_thread()] * 2


def test_a_function_of_other_arguments_is_an_error_of_the_reward():
    with pytest.raises(RewardError, match=r"raised TypeError: .*takes 1 positional argument but 3 were"):
        call(lambda responses: responses)


@pytest.mark.parametrize(
    ("scores", "count"), [([], "0 scores"), ([1.0], "1 score"), ([1.0, 2.0, 3.0], "3 scores")]
)
def test_a_wrong_count_names_both_numbers(scores, count):
    with pytest.raises(RewardError, match=f"'my_rewards:score' returned {count} for 2 samples$"):
        returning(scores)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "nan"),
        (3.5e38, r"3\.5e\+38"),
        (-1e300, r"-1e\+300"),
    ],
)
def test_a_score_that_is_not_finite_names_its_sample(number, text):
    message = (
        f"'my_rewards:score' returned {text} for sample 1 of its batch; scores must be finite, in float32"
    )
    with pytest.raises(RewardError, match=message):
        returning([0.0, number])
    with pytest.raises(RewardError, match=f"returned {text} for sample 0"):
        returning(np.array([number, 0.0]))
    with pytest.raises(RewardError, match=f"^a reward returned {text}; scores must be finite, in float32"):
        check_scores("a reward", [number], 1)


@pytest.mark.parametrize(
    "scores",
    [
        None,
        1.0,
        np.float64(1),
        torch.tensor(1.0),
        torch.tensor([[1.0, 2.0]]),
        [1.0, None],
        [1.0, "high"],
        [[1.0, 2.0], [3.0]],
        [1j, 2j],
    ],
    ids=repr,
)
def test_what_is_no_list_of_numbers_is_quoted(scores):
    with pytest.raises(
        RewardError, match="must return a list of numbers, one a sample; it returned "
    ) as caught:
        returning(scores)
    assert str(caught.value).endswith(repr(scores))


@pytest.mark.parametrize("scores", ["12", b"12", {0: 0.5, 1: 0.7}, {0.5, 0.7}], ids=repr)
def test_characters_keys_and_sets_are_no_scores_though_they_can_be_iterated(scores):
    with pytest.raises(RewardError, match="must return a list of numbers"):
        returning(scores)


def test_the_checks_name_whatever_scored():
    with pytest.raises(RewardError, match="reward model 'm' returned 1 score for 3 samples"):
        check_scores("reward model 'm'", [1.0], 3)


# --------------------------------------------------------------------------------------- weighted_sum


def test_the_reward_is_the_weighted_sum_of_its_parts():
    parts = {"help": [1.0, -2.0, 0.5], "length": [10.0, 20.0, 30.0]}
    assert weighted_sum(parts, {"help": 2.0, "length": -0.25}, 3) == [-0.5, -9.0, -6.5]


def test_a_part_of_weight_zero_is_watched_but_does_not_count():
    assert weighted_sum({"a": [1.0], "b": [5.0]}, {"a": 1.0, "b": 0.0}, 1) == [1.0]


def test_no_samples_have_no_rewards():
    assert weighted_sum({"a": []}, {"a": 1.0}, 0) == []


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_weighted_sum_is_a_matrix_product(data):
    names = ["a", "b", "c"][: data.draw(st.integers(1, 3))]
    num_samples = data.draw(st.integers(0, 5))
    number = st.floats(-100, 100)
    parts = {name: data.draw(st.lists(number, min_size=num_samples, max_size=num_samples)) for name in names}
    weights = {name: data.draw(number) for name in names}
    expected = np.array([weights[name] for name in names]) @ np.array([parts[name] for name in names])
    np.testing.assert_allclose(weighted_sum(parts, weights, num_samples), expected, rtol=1e-12, atol=1e-9)
