"""Prompts that were given up are written down whole, each once."""

from __future__ import annotations

from rlhf_dist.experience.dead_letter import DeadLetters, read_dead_letters


def test_a_dead_letter_has_the_prompt_and_a_reason_an_attempt(tmp_path, prompts):
    letters = DeadLetters(tmp_path)
    letters.append(23, ("w was lost", "the reward raised ValueError"), row=3, prompts=prompts)
    letters.append(4, ("w was lost",), row=4, prompts=prompts)
    letters.close()
    assert read_dead_letters(tmp_path) == [
        {
            "ordinal": 23,
            "row": 3,
            "reasons": ["w was lost", "the reward raised ValueError"],
            "prompt": "prompt 3",
            "columns": {"answer": 3},
        },
        {
            "ordinal": 4,
            "row": 4,
            "reasons": ["w was lost"],
            "prompt": "prompt 4",
            "columns": {"answer": 4},
        },
    ]


def test_a_prompt_that_was_written_down_twice_is_there_once(tmp_path, prompts):
    for reason in ("first", "again after a crash"):
        letters = DeadLetters(tmp_path)
        letters.append(1, (reason,), row=1, prompts=prompts)
        letters.close()
    assert [letter["reasons"] for letter in read_dead_letters(tmp_path)] == [["again after a crash"]]


def test_without_failures_there_is_no_letter(tmp_path):
    DeadLetters(tmp_path).close()
    assert list(tmp_path.iterdir()) == []
    assert read_dead_letters(tmp_path) == []
