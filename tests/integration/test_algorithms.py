"""Every algorithm on the real learner, and two of them through the whole system."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
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


def results_of(num_ranks, folder):
    """By rank, metrics of a few steps of each case: real DeepSpeed, neither Ray nor vLLM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("learner_steps.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
    (folder / "cases").write_text(json.dumps(list(CASES.values())))
    outputs = [folder / f"output-{rank}" for rank in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, (script, folder, rank, num_ranks, port))],
            stdin=(folder / "cases").open(),
            stdout=outputs[rank].open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank in range(num_ranks)
    ]
    deadline = time.monotonic() + 120
    try:
        while any(process.poll() is None for process in ranks):
            assert not any(process.poll() for process in ranks), [each.read_text() for each in outputs]
            assert time.monotonic() < deadline, [each.read_text() for each in outputs]
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
    texts = [output.read_text() for output in outputs]
    assert [process.returncode for process in ranks] == [0] * num_ranks, texts
    lines = [[each for each in text.splitlines() if each.startswith("RESULT")] for text in texts]
    return [
        dict(zip(CASES, [json.loads(line.removeprefix("RESULT")) for line in rank], strict=True))
        for rank in lines
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One rank, a minibatch in one piece."""
    return results_of(1, tmp_path_factory.mktemp("one-rank"))[0]


@pytest.fixture(scope="module")
def results_of_two_ranks(tmp_path_factory):
    """Two ranks, a minibatch in several pieces on each."""
    return results_of(2, tmp_path_factory.mktemp("two-ranks"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_depend_on_how_it_was_cut(case, results, results_of_two_ranks):
    one, other = (rank[case]["steps"][0] for rank in results_of_two_ranks)
    assert one == other, "every rank reports the same"
    assert one == pytest.approx(results[case]["steps"][0], rel=2e-3, abs=2e-5)


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
