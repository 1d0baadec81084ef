"""Every algorithm on the real learner, and two of them through the whole system."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.algorithms import algorithm_names

CASES = {name: {"name": name} for name in algorithm_names()} | {
    "warm-up": {"name": "ppo", "value_warmup_steps": 1},
    "early stop": {"name": "ppo", "num_epochs": 6, "target_kl": 1e-7},
    "truncated": {"name": "ppo", "correction": {"kind": "tis", "cap": 1.01}},
    "dropped": {"name": "gspo", "correction": {"kind": "icepop"}, "kl": {"coef": 0.1}},
    "sampler's ratio": {"name": "grpo", "correction": {"old_logprobs": "rollout"}},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Metrics of a few steps of each case, from one process with DeepSpeed and neither Ray nor vLLM."""
    command = [sys.executable, Path(__file__).with_name("learner_steps.py"), tmp_path_factory.mktemp("steps")]
    done = subprocess.run(
        command,
        input=json.dumps(list(CASES.values())),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RESULT") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_learner_does_the_same_step(case, results):
    uninterrupted, resumed = results[case]["resumed"]
    assert resumed == uninterrupted


@pytest.mark.parametrize("case", CASES)
def test_steps_train_what_the_algorithm_needs(case, results):
    for metrics in results[case]["steps"][1:]:
        assert metrics["policy_grad_norm"] > 0
        assert 0 < metrics["effective_sample_size"] <= 1
        assert metrics["rollout_learner_kl"] > 0
        assert ("value_loss" in metrics) == (CASES[case]["name"] in ("ppo", "ppo_kl"))


def test_the_first_steps_of_a_warm_up_train_the_value_model_alone(results):
    first, second = results["warm-up"]["steps"]
    assert first["value_grad_norm"] > 0
    assert not any(name in first for name in ("policy_loss", "policy_grad_norm", "policy_approx_kl_last"))
    assert second["policy_approx_kl_last"] > 0


def test_a_step_ends_with_the_update_that_finds_the_policy_too_far_off(results):
    assert [metrics["num_updates"] for metrics in results["early stop"]["steps"]] == [2, 2]
    assert [metrics["num_updates"] for metrics in results["ppo"]["steps"]] == [4, 4]


def test_the_share_of_corrected_tokens_is_reported(results):
    for metrics in results["truncated"]["steps"]:
        assert 0 < metrics["correction_truncated_share"] < 1
        assert metrics["correction_weight_mean"] <= 1.01
    assert "correction_weight_mean" not in results["ppo"]["steps"][0]


def test_a_ratio_to_the_sampler_holds_the_gap_from_the_first_update_on(results):
    """GRPO does one update a step: to the learner's own log-probabilities its divergence is 0."""
    for metrics in results["sampler's ratio"]["steps"]:
        assert metrics["policy_approx_kl_last"] == pytest.approx(metrics["rollout_learner_kl"], rel=1e-3)
    for metrics in results["grpo"]["steps"]:
        assert metrics["policy_approx_kl_last"] == pytest.approx(0, abs=1e-6)


def test_the_penalty_of_ppo_kl_follows_the_measured_divergence(results):
    first, second = results["ppo_kl"]["steps"]
    factor = second["policy_penalty_coef"] / first["policy_penalty_coef"]
    measured = first["policy_approx_kl_last"] / 0.01
    assert factor == (2.0 if measured > 1.5 else 0.5 if measured < 1 / 1.5 else 1.0)


def test_the_metrics_that_the_documentation_tells_to_watch_exist(results):
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `") and line.count("|") == 7]
    named = {name for row in rows for name in re.findall("`([a-z_0-9]+)`", row[5])}
    reported = {name for result in results.values() for metrics in result["steps"] for name in metrics}
    assert len(named) > 20
    assert named <= reported


@pytest.mark.parametrize(
    ("algorithm", "value_model"),
    [("{name: grpo, num_epochs: 2}", False), ("{name: ppo_kl, num_epochs: 2}", True)],
    ids=["grpo", "ppo_kl"],
)
def test_a_run_of_another_algorithm(algorithm, value_model, train, small):
    overrides = [each for each in small if not each.startswith("algorithm.")]
    run = train(
        *overrides,
        "run.num_steps=2",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        f"algorithm={algorithm}",
    )
    assert run.returncode == 0, run.output
    assert [metrics["step"] for metrics in run.metrics] == [0, 1]
    for metrics in run.metrics:
        assert metrics["num_samples"] == 16
        assert ("value_loss" in metrics) == value_model
        assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-3)
