"""However a run ends, nothing of it is left, and what was trained is not lost."""

from __future__ import annotations

import signal
import socket

import pytest

BAD_REWARDS = """
def boom(prompts, responses, columns):
    raise KeyError("colour")

def one_score(prompts, responses, columns):
    return [1.0]
"""


def _titles(command):
    """What the process list shows, without the method that a worker is busy with."""
    return {(process.cmdline() or [""])[0].split(".")[0] for process in command.processes()}


def test_the_roles_are_told_apart_and_ctrl_c_ends_them(start, small):
    command = start(*small, "run.num_steps=1000", "checkpoint.every_steps=1")
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first step")
    roles = {"RolloutWorker", "ScoringWorker", "LearnerWorker", "ExperienceQueue"}
    assert {f"ray::{role}" for role in roles} <= _titles(command)
    command.send(signal.SIGINT)
    run = command.wait()
    assert run.returncode == 130
    assert "--resume" in run.output
    assert "Traceback" not in run.output
    command.assert_nothing_left()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_workers_start_leaves_nothing(start, small, number, code):
    command = start(*small)
    command.wait_until(lambda: "ray::RolloutWorker" in _titles(command), "a rollout worker")
    command.send(number)
    assert command.wait().returncode == code
    command.assert_nothing_left()


def test_a_killed_driver_takes_its_workers_along(start, small):
    command = start(*small, "run.num_steps=1000")
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first step")
    command.send(signal.SIGKILL)
    assert command.wait().returncode == -signal.SIGKILL
    command.assert_nothing_left(deadline_s=150)  # Ray's own agents count five looks at their dead parent


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("boom", "reward function 'bad_rewards:boom' raised KeyError: 'colour'"),
        ("one_score", "reward function 'bad_rewards:one_score' returned 1 scores for 8 samples"),
    ],
)
def test_a_bad_reward_function_stops_the_run_with_one_message(train, small, tmp_path, function, message):
    (tmp_path / "bad_rewards.py").write_text(BAD_REWARDS)
    run = train(*small, f"reward.0.path=bad_rewards:{function}", cwd=tmp_path)
    assert run.returncode == 5
    errors = [line for line in run.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in run.output


def test_a_dead_address_is_refused_at_once(train, small):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        run = train(*small, "--address", f"127.0.0.1:{unused.getsockname()[1]}")
    assert run.returncode == 6
    assert "no Ray cluster answers at '127.0.0.1:" in run.output
    assert "Traceback" not in run.output


def test_resume_goes_on_where_the_checkpoint_was(train, small):
    first = train(*small, "run.num_steps=2", "checkpoint.every_steps=1")
    assert first.returncode == 0, first.output
    first_metrics = first.metrics
    again = train(*small, "run.num_steps=4", folder=first.folder)
    assert again.returncode == 2
    assert "already holds a run" in again.output
    resumed = train(*small, "run.num_steps=4", "--resume", folder=first.folder)
    assert resumed.returncode == 0, resumed.output
    assert [step["step"] for step in resumed.metrics] == [0, 1, 2, 3]
    assert [step["policy_version"] for step in resumed.metrics] == [1, 2, 3, 4]
    assert resumed.metrics[:2] == first_metrics
