"""`rlhf-dist bench algorithms` on the real system, as small as it gets."""

from __future__ import annotations

import json
import signal

import pytest

pytestmark = pytest.mark.long
SMALL = (
    *("--seeds", "1", "run.seed=3", "run.num_steps=2", "run.num_sample_answers=1", "sft.num_steps=2"),
    *("sft.warmup_steps=0", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2"),
    *("rollout.num_workers=1", "reward.0.path=small_rewards:vowels"),
)
REWARD = """
def vowels(prompts, responses, columns):
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in responses]
"""
TUNING = """
common: [learner.num_workers=1]
per_algorithm: {rloo: [learner.num_workers=999]}
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """How the command is started here: with a reward that even an untrained policy gets some of."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "small_rewards.py").write_text(REWARD)
    (folder / "tuning.yaml").write_text(TUNING)
    return {"bench": "algorithms", "cwd": folder}


@pytest.fixture(scope="module")
def compared(train, bench):
    """Two algorithms, and one that no machine can place."""
    return train(*SMALL, "--tuning", "tuning.yaml", "--algorithms", "ppo,rloo,grpo", **bench)


def test_a_failed_run_is_reported_and_does_not_end_the_comparison(compared):
    assert compared.returncode == 1
    assert "rloo, seed 3 (2 of 3): failed: " in compared.output
    assert "error: 1 of 3 runs failed: rloo, seed 3;" in compared.output
    assert "Traceback" not in compared.output
    results = json.loads((compared.folder / "results.json").read_text())["algorithms"]
    (rloo,) = results["rloo"]["runs"]
    assert rloo["curve"] is None
    assert "999" in rloo["error"]
    assert results["rloo"]["summary"]["num_failed"] == 1


def test_algorithms_start_from_one_policy_with_the_same_samples(compared):
    results = json.loads((compared.folder / "results.json").read_text())["algorithms"]
    curves = {name: results[name]["runs"][0]["curve"] for name in ("ppo", "grpo")}
    assert curves["ppo"]["rewards"][0] == curves["grpo"]["rewards"][0] > 0
    assert [len(curve["rewards"]) for curve in curves.values()] == [2, 2]
    assert {curve["samples_per_step"] for curve in curves.values()} == {8}
    assert results["ppo"]["settings"]["sft"] is None


def test_table_and_picture_are_there(compared):
    lines = (compared.folder / "table.md").read_text().splitlines()
    assert {line.split(" | ")[0] for line in lines[2:]} == {"| `ppo`", "| `grpo`", "| `rloo`"}
    assert (compared.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "samples to reward 0.8" in lines[0]
    assert all(f"│ {name}" in compared.output for name in ("ppo", "grpo", "rloo"))


def test_what_is_complete_is_not_done_again(compared, train, bench):
    metrics = [compared.folder / "runs" / name / "seed-3" / "metrics.jsonl" for name in ("ppo", "grpo")]
    before = [path.stat().st_mtime_ns for path in metrics]
    arguments = (*SMALL, "--tuning", "tuning.yaml", "--algorithms", "ppo,grpo")
    again = train(*arguments, folder=compared.folder, **bench)
    assert again.returncode == 0, again.output
    assert again.output.count("was done before") == 3
    assert [path.stat().st_mtime_ns for path in metrics] == before


def test_ctrl_c_ends_the_run_under_way(start, bench):
    command = start(*SMALL, **bench)
    command.wait_until(
        lambda: any("SupervisedWorker" in " ".join(process.cmdline()) for process in command.processes()),
        "a worker",
    )
    command.send(signal.SIGINT)
    run = command.wait()
    assert run.returncode == 130, run.output
    assert "interrupted; the same command goes on where it stopped" in run.output
    command.assert_nothing_left()
