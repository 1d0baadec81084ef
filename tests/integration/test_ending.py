"""However a run ends, nothing of it is left, and what was trained is not lost."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from rlhf_dist.config import load_config

BAD_REWARDS = """
def boom(prompts, responses, columns):
    raise KeyError("colour")
"""


def _titles(command):
    """What the process list shows, without the method that a worker is busy with."""
    return {(process.cmdline() or [""])[0].split(".")[0] for process in command.processes()}


def _snapshots(process):
    """Pieces of shared memory that a process writes snapshots into."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return sum("/memfd:rlhf-dist (deleted)" in line and " rw-s " in line for line in maps)


@pytest.mark.long
def test_the_roles_are_told_apart_and_ctrl_c_ends_them(start, lean):
    command = start(*lean, "run.num_steps=1000", "checkpoint.every_steps=1")
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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_a_signal_while_workers_start_leaves_nothing(start, lean, number, code):
    command = start(*lean)
    command.wait_until(lambda: "ray::RolloutWorker" in _titles(command), "a rollout worker")
    command.send(number)
    assert command.wait().returncode == code
    command.assert_nothing_left()


@pytest.mark.long
def test_a_rank_of_the_supervised_stage_that_hangs_ends_the_run(start):
    heartbeat = ("recovery.heartbeat_interval_s=1", "recovery.heartbeat_timeout_s=10")
    command = start("sft.num_steps=1000000", "run.num_sample_answers=1", *heartbeat)

    def training():
        step = "ray::SupervisedWorker.step"
        return [each for each in command.processes() if (each.cmdline() or [""])[0] == step]

    command.wait_until(lambda: len(training()) == 2, "both ranks")
    training()[0].send_signal(signal.SIGSTOP)
    run = command.wait()
    assert run.returncode == 8
    assert "did not answer a heartbeat (recovery.heartbeat_timeout_s) within 10 s" in run.output
    command.assert_nothing_left()


@pytest.mark.long
def test_where_nothing_may_be_replaced_a_killed_learner_ends_the_run_and_its_snapshots_go_with_it(
    start, small
):
    command = start(*small, "run.num_steps=1000", "recovery.max_restarts=0")
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first step")
    ranks = [each for each in command.processes() if "LearnerWorker" in (each.cmdline() or [""])[0]]
    snapshots = {rank: _snapshots(rank) for rank in ranks}
    assert sorted(snapshots.values()) == [0, 2], "on one rank, in memory that has no name"
    publisher = max(snapshots, key=snapshots.get)
    publisher.kill()
    run = command.wait()
    assert run.returncode == 9
    assert "learner worker 0 was lost" in run.output
    assert "recovery.max_restarts=0" in run.output
    assert "learner worker 0 died while it was to " in run.output
    command.assert_nothing_left()


def test_a_bad_reward_function_stops_the_run_with_one_message(train, lean, tmp_path):
    (tmp_path / "bad_rewards.py").write_text(BAD_REWARDS)
    run = train(*lean, "reward.0.path=bad_rewards:boom", cwd=tmp_path)
    assert run.returncode == 5
    errors = [line for line in run.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "reward function 'bad_rewards:boom' raised KeyError: 'colour'" in errors[0]
    assert "Traceback" not in run.output


def test_a_dead_address_is_refused_at_once(train, lean):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        run = train(*lean, "--address", f"127.0.0.1:{unused.getsockname()[1]}")
    assert run.returncode == 6
    assert "no Ray cluster answers at '127.0.0.1:" in run.output
    assert "Traceback" not in run.output


@pytest.mark.long
def test_resume_goes_on_where_the_checkpoint_was(train, lean):
    first = train(*lean, "run.num_steps=2", "checkpoint.every_steps=1")
    assert first.returncode == 0, first.output
    first_metrics = first.metrics
    again = train(*lean, "run.num_steps=4", folder=first.folder)
    assert again.returncode == 2
    assert "already holds a run" in again.output
    changed = ("run.num_steps=4", "run.num_sample_answers=9")
    resumed = train(*lean, *changed, "--resume", folder=first.folder)
    assert resumed.returncode == 0, resumed.output
    assert [step["step"] for step in resumed.metrics] == [0, 1, 2, 3]
    assert [step["policy_version"] for step in resumed.metrics] == [1, 2, 3, 4]
    assert resumed.metrics[:2] == first_metrics
    assert "run.num_steps: 2 -> 4" in resumed.output
    assert load_config(resumed.folder / "config.yaml").run.num_steps == 4


@pytest.mark.long
def test_a_killed_driver_takes_its_workers_along(start, lean):
    """Ray's own agents are last: they count five looks at their dead parent."""
    command = start(*lean, "run.num_steps=1000")
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first step")
    command.send(signal.SIGKILL)
    assert command.wait().returncode == -signal.SIGKILL
    command.assert_nothing_left(deadline_s=150)
