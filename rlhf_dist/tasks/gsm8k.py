"""A reward for GSM8K, grade-school word problems with worked answers (Cobbe et al., 2021, arXiv:2110.14168).

The rows come from a file or the hub; each has `question` and `answer`, and an answer looks like::

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
    #### 72

A response is asked for the same form: calculator marks in the steps, and a last line `#### number`.

- 0.8 for the right number in a well-formed last line;
- 0.1 for a well-formed last line, right or wrong;
- 0.1 times the share of calculator marks whose arithmetic is right; without any mark 0, unless the
  reference answer has none either.

So the reference answer scores 1, a right number without its working 0.9, a wrong one with flawless
arithmetic 0.2. `#### 1,000`, `#### $1000` and `#### 1000.00` are the same number. Only the last line
counts, and only one `####` may be there: a list of guesses is not a well-formed answer.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from rlhf_dist.errors import DataError

FINAL_WEIGHT = 0.8
FORM_WEIGHT = 0.1
MARKS_WEIGHT = 0.1

MAX_RESPONSE_LENGTH = 20_000
MAX_FINAL_LINE_LENGTH = 40
MAX_EXPRESSION_LENGTH = 200
"""Bounds, in characters, on what is looked at: a response costs little work whatever it holds."""

TOLERANCE = Fraction(1, 100)
"""Results in calculator marks are often rounded, to two decimals as a rule: 10/3=3.33."""

_FINAL_LINE = re.compile(r"####\s*(-?\$?|\$-)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
_MARK = re.compile(r"<<([^<>\n]*)>>")
_ARITHMETIC = re.compile(r"[\d.+\-*/() ]+", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def reward(prompts: list[str], responses: list[str], columns: dict[str, list]) -> list[float]:  # noqa: ARG001
    """Score each response between 0 and 1 against `columns["answer"]`.

    Raises:
        DataError: a reference answer has no final line `#### number`.
    """
    return [_score(*pair) for pair in zip(responses, columns["answer"], strict=True)]


def final_answer(text: str) -> Fraction | None:
    """The number of a well-formed last line `#### number`; None if there is no such line."""
    last_line = text.strip().rpartition("\n")[2].strip()
    match = _FINAL_LINE.fullmatch(last_line)
    if match is None or text.count("####") > 1 or len(last_line) > MAX_FINAL_LINE_LENGTH:
        return None
    sign, digits = match.groups()
    number = Fraction(digits.replace(",", ""))
    return -number if "-" in sign else number


def share_of_right_marks(text: str) -> float | None:
    """The share of the calculator marks `<<expression=result>>` that are right; None if there are none."""
    marks = _MARK.findall(text)
    return sum(_is_right(mark) for mark in marks) / len(marks) if marks else None


def _score(response: str, reference: str) -> float:
    """The score of one response."""
    wanted = final_answer(reference)
    if wanted is None:
        raise DataError(f"GSM8K reference answer has no last line '#### number': {reference!r}")
    if len(response) > MAX_RESPONSE_LENGTH:
        return 0.0
    given = final_answer(response)
    right_marks = share_of_right_marks(response)
    if right_marks is None:
        right_marks = float(given == wanted and share_of_right_marks(reference) is None)
    return FINAL_WEIGHT * (given == wanted) + FORM_WEIGHT * (given is not None) + MARKS_WEIGHT * right_marks


def _is_right(mark: str) -> bool:
    """Whether the expression of a mark comes to the result it states."""
    expression, equals, stated = mark.rpartition("=")
    if not equals or len(mark) > MAX_EXPRESSION_LENGTH:
        return False
    try:
        return abs(_evaluate(expression) - _evaluate(stated)) <= TOLERANCE
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, ValueError):
        return False


def _evaluate(expression: str) -> Fraction:
    """The exact value of sums, differences, products and quotients of numbers.

    Raises:
        ValueError, SyntaxError, ZeroDivisionError: it is something else, or has no value.
    """
    if not _ARITHMETIC.fullmatch(expression):
        raise ValueError(f"not arithmetic: {expression!r}")
    return _value(ast.parse(_LEADING_ZEROS.sub("", expression.strip()), mode="eval").body)


def _value(node: ast.AST) -> Fraction:
    """The value of a node of an expression's syntax tree."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")
