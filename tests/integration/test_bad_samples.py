"""Samples that no reward can be had for: tried again elsewhere, then dead letters, and the run goes on."""

from __future__ import annotations

import json

import pytest

from rlhf_dist.experience.dead_letter import read_dead_letters
from rlhf_dist.experience.journal import read_table
from rlhf_dist.observability.run_events import read_run_events

MOODY = """
import time, zlib

def mood(prompt):
    number = zlib.crc32(prompt.encode())
    if number % 48 == 34:
        return "hangs"
    if number % 48 == 36:
        return "nan"
    return "raises" if number % 16 == 3 else "fine"

def moody(prompts, responses, columns):
    moods = [mood(prompt) for prompt in prompts]
    if "hangs" in moods:
        time.sleep(600)
    if "raises" in moods:
        raise ValueError("not this one")
    return [float("nan") if each == "nan" else len(text) / 64 for each, text in zip(moods, responses)]
"""
STEPS = 3


@pytest.fixture(scope="module")
def moody(tmp_path_factory, train, lean):
    """A run whose reward raises on some prompts, returns NaN for some, and hangs on some."""
    folder = tmp_path_factory.mktemp("moody")
    (folder / "moody_rewards.py").write_text(MOODY)
    run = train(
        *lean,
        f"run.num_steps={STEPS}",
        "scoring.num_workers=2",
        "scoring.max_attempts=2",
        "experience.max_failed_share=0.5",
        "recovery.backoff_s=0",
        'reward=[{path: "moody_rewards:moody", timeout_s: 2}]',
        cwd=folder,
    )
    assert run.returncode == 0, run.output
    return run


def mood(prompt):
    names: dict = {}
    exec(MOODY, names)
    return names["mood"](prompt)


def test_what_cannot_be_scored_is_in_the_dead_letters_with_a_reason_an_attempt(moody):
    letters = read_dead_letters(moody.folder / "journal")
    expected = {
        "raises": "reward function 'moody_rewards:moody' raised ValueError: not this one",
        "nan": "returned nan",
        "hangs": "did not return within 2 s",
    }
    assert {mood(letter["prompt"]) for letter in letters} == set(expected)
    for letter in letters:
        assert len(letter["reasons"]) >= 2
        assert expected[mood(letter["prompt"])] in letter["reasons"][-1]


def test_every_step_has_all_its_samples_and_none_of_the_bad_ones(moody):
    assert [metrics["num_samples"] for metrics in moody.metrics] == [16] * STEPS
    trained = read_table(moody.folder, ["prompt"]).to_pylist()
    assert {mood(row["prompt"]) for row in trained if row["step"] is not None} == {"fine"}


def test_the_count_is_reported(moody):
    counts = [metrics["num_failed_prompts"] for metrics in moody.metrics]
    assert counts == sorted(counts)
    assert counts[-1] == len(read_dead_letters(moody.folder / "journal")) >= 3


def test_a_worker_whose_reward_hangs_is_replaced(moody):
    events = read_run_events(moody.folder / "events.jsonl")
    assert {event["role"] for event in events} == {"scoring"}
    lost = [event for event in events if event["event"] == "lost"]
    assert lost
    assert all("did not return within 2 s" in event["error"] for event in lost)


def test_the_journal_is_in_order(moody, inspect):
    found = inspect(moody.folder)
    assert (found["missing"], found["doubled"]) == ([], [])


@pytest.fixture
def inspect():
    """What `rlhf-dist inspect --json` says."""
    from typer.testing import CliRunner

    from rlhf_dist.cli import app

    def of(folder):
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return of
