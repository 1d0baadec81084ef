"""Learner steps done again from a run's folder alone: the same policies, bit for bit, and nothing written."""

from __future__ import annotations

import json
import signal

import pytest
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def finished(recorded):
    """A run with checkpoints before steps 2 and 4."""
    return recorded.run


def state_of(folder):
    """Names, sizes and times of all that is in a folder."""
    stats = {path: path.stat() for path in [folder, *folder.rglob("*")]}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def result_of(run):
    return json.loads(run.output[run.output.index("{\n") :])


def test_a_middle_range_gives_the_same_policies_and_can_be_exported(train, finished, tmp_path):
    before = state_of(finished.folder)
    out = tmp_path / "policy"
    replayed = train(
        *("--from-step", "3", "--to-step", "4", "--json", "--out", str(out)), replay=finished.folder
    )
    assert replayed.returncode == 0, replayed.output
    result = result_of(replayed)
    assert (result["checkpoint"], result["first_step"], result["same"]) == ("step-000002", 2, True)
    (step,) = result["steps"]
    metrics = finished.metrics[3]
    assert step["recorded_digest"] == step["replayed_digest"]
    assert (step["step"], step["num_samples"]) == (3, 16)
    assert (step["reward_mean"], step["policy_loss"]) == (metrics["reward_mean"], metrics["policy_loss"])
    assert state_of(finished.folder) == before, "the run's folder is only read"
    expected, exported = (load_file(each / "model.safetensors") for each in (finished.folder / "policy", out))
    assert expected.keys() == exported.keys()
    assert all(expected[name].equal(tensor) for name, tensor in exported.items())
    assert (out / "tokenizer.json").read_bytes() == (finished.folder / "policy/tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.long
def test_the_whole_run_can_be_replayed_from_the_starting_policy(train, finished):
    replayed = train(replay=finished.folder)
    assert replayed.returncode == 0, replayed.output
    rows = [line for line in replayed.output.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["0", "1", "2", "3"]
    assert all(row.endswith(" yes │") for row in rows)
    assert "every step gave the policy that the run had, bit for bit" in replayed.output


@pytest.mark.long
def test_another_setting_gives_another_policy_and_that_is_no_failure(train, finished):
    override = "algorithm.clip_low=0.00001"
    arguments = ("--from-step", "2", "--to-step", "3", "--json", override)
    replayed = train(*arguments, replay=finished.folder)
    assert replayed.returncode == 0, replayed.output
    result = result_of(replayed)
    assert (result["same"], result["as_expected"], result["changed"]) == (False, True, [override])
    assert result["steps"][0]["reward_mean"] == finished.metrics[2]["reward_mean"], "the same experience"


def test_steps_that_were_not_trained_are_refused_at_once(train, finished):
    refused = train("--from-step", "2", "--to-step", "9", replay=finished.folder)
    assert refused.returncode == 2
    assert "has the trained steps 0 to 3, and not all of 2 to 8" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.long
def test_ctrl_c_leaves_nothing(start, finished, tmp_path):
    before = state_of(finished.folder)
    command = start("--out", str(tmp_path / "policy"), replay=finished.folder)
    command.wait_until(
        lambda: any("ray::LearnerWorker" in (each.cmdline() or [""])[0] for each in command.processes()),
        "a learner worker",
    )
    command.send(signal.SIGINT)
    interrupted = command.wait()
    assert interrupted.returncode == 130, interrupted.output
    assert "interrupted; the run's folder is as it was" in interrupted.output
    command.assert_nothing_left()
    assert state_of(finished.folder) == before
    assert list(tmp_path.iterdir()) == []
