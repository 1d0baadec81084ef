"""The GSM8K reward: levels, number formats, and responses that mean harm."""

from __future__ import annotations

import gzip
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf_dist.errors import DataError
from rlhf_dist.tasks.gsm8k import final_answer, reward, share_of_right_marks

REFERENCE = "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72 altogether.\n#### 72"


def score(response: str, reference: str = REFERENCE) -> float:
    return reward(["a question"], [response], {"answer": [reference]})[0]


@pytest.mark.parametrize(
    ("level", "response"),
    [
        (1.0, REFERENCE),
        (1.0, "<<48+24=72>>\n#### 72\n"),
        (0.95, "<<48/2=25>>25\n<<48+24=72>>72\n#### 72"),
        (0.9, "<<48+24=73>>73\n#### 72"),
        (0.9, "#### 72"),
        (0.2, "<<48/2=24>>24\n#### 24"),
        (0.15, "<<48/2=25>>25 <<1+1=2>>\n#### 25"),
        (0.1, "#### 71"),
        (0.1, "<<48+24=72>>72"),
        (0.0, "The answer is 72."),
        (0.0, ""),
    ],
)
def test_levels(level: float, response: str) -> None:
    assert score(response) == pytest.approx(level)


def test_without_marks_as_the_reference() -> None:
    assert score("#### 5", "It is five.\n#### 5") == pytest.approx(1)
    assert score("#### 6", "It is five.\n#### 5") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("#### 72", 72),
        ("####72", 72),
        ("#### 1,234,567", 1234567),
        ("#### $1,000.50", Fraction("1000.5")),
        ("#### -3", -3),
        ("#### -$3", -3),
        ("#### $-3", -3),
        ("#### .5", Fraction(1, 2)),
        ("#### 5.00", 5),
        ("#### 007", 7),
        ("#### 10,00", None),
        ("#### 7$2", None),
        ("#### 72 apples", None),
        ("#### 7 2", None),
        ("#### 5.", None),
        ("#### ", None),
        ("#### --3", None),
        ("#### 1e3", None),
        ("#### nan", None),
        ("#### \u0667\u0662", None),
        ("#### 72\nmore text", None),
        ("so #### 72", None),
        ("#### 71\n#### 72", None),
        ("72", None),
    ],
)
def test_final_answer(line: str, number: int | Fraction | None) -> None:
    assert final_answer(line) == number


@pytest.mark.parametrize(
    ("marks", "share"),
    [
        ("<<2*(3+4)=14>>", 1.0),
        ("<<10/3=3.33>>", 1.0),
        ("<<10/3=3.3>>", 0.0),
        ("<<-5+.5=-4.5>>", 1.0),
        ("<<05+05=010>>", 1.0),
        ("<<7//2=3>>", 1.0),
        ("<<1+1=2>> <<1+1=3>>", 0.5),
        ("<<1+1>>", 0.0),
        ("<<=>>", 0.0),
        ("<<>>", 0.0),
        ("<<1+1=2", None),
        ("1+1=2>>", None),
        ("no marks", None),
    ],
)
def test_share_of_right_marks(marks: str, share: float | None) -> None:
    assert share_of_right_marks(marks) == share


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9=1",
        "1/0=1",
        "1//0=1",
        "1/(2-2)=1",
        "1e999999=1",
        "(" * 90 + "1" + ")" * 90 + "=(",
        "(" * 5000 + "=1",
        "-" * 5000 + "1=1",
        "9" * 10_000 + "=" + "9" * 10_000,
        "__import__('os').getpid()=1",
        "1 if 1 else 2=1",
        "[1]*9=1",
        "2(3)=6",
        "'a'*9=1",
        "1_0=10",
        "1..2=1",
        "()=()",
        "\x00=\x00",
        "1=1=1=",
    ],
)
def test_hostile_marks_are_wrong(expression: str) -> None:
    assert share_of_right_marks(f"<<{expression}>>") == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "#### " + "9" * 1_000_000,
        "#### " + "9" * 1_000,
        "#### 1" + ",000" * 1_000,
        "<<" * 500_000,
        "<<" * 9_000,
        "<<1+1=" * 3_000,
        "####" * 5_000,
        "\n" * 19_000 + "####",
        "\ud800",
    ],
)
def test_hostile_responses_cost_little(response: str) -> None:
    started = time.perf_counter()
    assert score(response) == 0.0
    assert time.perf_counter() - started < 1.0


def test_many_marks_earn_no_more_than_one() -> None:
    assert score("<<1+1=2>>" * 2_000) == pytest.approx(0.1)
    assert score("<<1+1=2>>" * 20_000) == 0.0


def test_reference_without_an_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="no last line '#### number': 'just text'"):
        score("#### 1", "just text")


def test_every_reference_answer_scores_1() -> None:
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k_train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"GSM8K is not there: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    scores = reward([""] * len(answers), answers, {"answer": answers})
    assert len(scores) == 7473
    assert min(scores) == pytest.approx(1)
