"""What a person sees: the table of first and last steps, the answers, and the line of a step."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_dist.observability.progress import Progress
from rlhf_dist.observability.report import ROWS, print_report, summary_table


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def cells(metrics):
    """Heading and rows of the table, as text."""
    table = summary_table(metrics)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    return [column.header for column in table.columns], rows


def test_the_columns_are_means_of_the_first_and_last_five_steps():
    heading, rows = cells([{"step": step, "reward_mean": float(step)} for step in range(12)])
    assert heading == ["", "first 5", "last 5"]
    assert rows == [("reward", "2", "9")]
    assert summary_table([{"step": 0}] * 12).title == "12 steps"


@pytest.mark.parametrize(
    ("num_steps", "width", "first", "last"),
    [(1, 1, "0", "0"), (2, 1, "0", "1"), (3, 1, "0", "2"), (5, 2, "0.5", "3.5"), (9, 4, "1.5", "6.5")],
)
def test_a_short_run_has_windows_that_do_not_overlap(num_steps, width, first, last):
    heading, rows = cells([{"reward_mean": float(step)} for step in range(num_steps)])
    assert heading == ["", f"first {width}", f"last {width}"]
    assert rows == [("reward", first, last)]


def test_rows_are_those_that_the_run_has_in_the_order_of_the_report():
    step = {"seconds_step": 2.0, "entropy": 0.123456, "reward_mean": 1.0, "unknown_to_the_report": 5.0}
    _, rows = cells([step, step])
    assert rows == [
        ("reward", "1", "1"),
        ("entropy, nats a token", "0.1235", "0.1235"),
        ("seconds a step", "2", "2"),
    ]
    assert "unknown_to_the_report" not in ROWS


def test_each_part_of_the_reward_has_a_row():
    _, rows = cells([{"reward_mean": 3.0, "reward_part_help": 1.0, "reward_part_tone": 2.0}])
    assert rows == [("reward", "3", "3"), ("reward: help", "1", "1"), ("reward: tone", "2", "2")]


def test_what_was_no_number_is_left_out_of_the_mean():
    metrics = [{"kl_ref": value} for value in (1.0, None, None, 4.0)]
    assert cells(metrics)[1] == [("KL to the reference, nats a token", "1", "4")]
    metrics = [{"kl_ref": value} for value in (None, None, 2.0, 4.0)]
    assert cells(metrics)[1] == [("KL to the reference, nats a token", "-", "3")]


def test_the_report_has_table_answers_and_the_policys_folder(console):
    answers = [("Is [it]\nlate?", "no " * 300, "Yes.")]
    metrics = [{"reward_mean": 0.25}, {"reward_mean": 0.75}]
    print_report(console, metrics, answers, policy_folder=Path("/runs/a/policy"), seconds=61.4)
    text = " ".join(console.file.getvalue().split())
    assert text.startswith("2 steps ")
    before = ("no " * 300)[:400]
    assert text.endswith(
        f"prompt Is [it] late? before {before} … after Yes. trained policy: /runs/a/policy (61 s)"
    )


STEP = {
    "step": 4,
    "reward_mean": 0.5,
    "kl_ref": 0.01234,
    "entropy": 1.5,
    "response_tokens_mean": 12.34,
    "tokens_per_s": 678.9,
    "seconds_step": 2.04,
}


def test_a_step_is_one_line_with_its_numbers(console):
    Progress(console, num_steps=40).step_done(STEP)
    assert console.file.getvalue() == (
        "step    5/40  reward 0.500  KL 0.0123  entropy 1.500  length 12.3  679 tokens/s  2.0 s\n"
    )


def test_without_a_reference_the_line_has_no_kl(console):
    Progress(console, num_steps=40).step_done({name: STEP[name] for name in STEP if name != "kl_ref"})
    assert "reward 0.500  entropy" in console.file.getvalue()


def test_in_a_log_there_is_no_live_line(console):
    with Progress(console, num_steps=2) as progress:
        progress.phase("rollout")
        progress.say("3 prompts over the limit were left out")
    assert console.file.getvalue() == "3 prompts over the limit were left out\n"
