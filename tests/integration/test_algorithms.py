"""Every algorithm on the real learner, and two of them through the whole system."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from rlhf_dist.algorithms import algorithm_names

CASES = {name: {"name": name} for name in algorithm_names()} | {
    "warm-up": {"name": "ppo", "value_warmup_steps": 1},
    "early stop": {"name": "ppo", "num_epochs": 6, "target_kl": 1e-7},
    "truncated": {"name": "ppo", "correction": {"kind": "tis", "cap": 1.01}},
    "dropped": {"name": "gspo", "correction": {"kind": "icepop"}, "kl": {"coef": 0.1}},
    "sampler's ratio": {"name": "grpo", "correction": {"old_logprobs": "rollout"}},
    "adapters": {"name": "ppo", "lora": {"rank": 4}},
    "adapters in a trust region": {"name": "trpo", "lora": {"rank": 4}},
}

WITH_VALUE_MODEL = {"ppo", "ppo_kl", "trpo"}
OF_THE_DRIVER = {"staleness_max", "temperature"}
"""Metrics that the documentation tells to watch and the learner does not know."""
SHARE_OF_MOVE, ROUNDING = 1e-4, 5e-7
"""Largest difference of a parameter after two steps that float32 sums in another order may make: a share of
the longest way that any went, and a few roundings of one near 1."""


def results_of(num_ranks, folder):
    """By rank, metrics of a few steps of each case: real DeepSpeed, neither Ray nor vLLM."""
    results = run_ranks("learner_steps.py", num_ranks, folder, list(CASES.values()))
    return [dict(zip(CASES, rank, strict=True)) for rank in results]


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
def test_parameters_do_not_depend_on_how_the_steps_were_cut(case, results, results_of_two_ranks):
    whole, one, other = (
        torch.load(result[case]["parameters"], weights_only=True)
        for result in (results, *results_of_two_ranks)
    )
    models = {"policy", "value"} if CASES[case]["name"] in WITH_VALUE_MODEL else {"policy"}
    assert {name.split(".")[0] for name in whole["trained"]} == models
    for model in models:
        names = [name for name in whole["trained"] if name.startswith(model)]
        moved = max(float((whole["trained"][name] - whole["start"][name]).abs().max()) for name in names)
        assert moved > 100 * ROUNDING, "there is something to compare"
        for name in names:
            assert torch.equal(one["trained"][name], other["trained"][name]), f"{name} differs between ranks"
            torch.testing.assert_close(
                one["trained"][name],
                whole["trained"][name],
                rtol=0,
                atol=SHARE_OF_MOVE * moved + ROUNDING,
                msg=lambda text, name=name: f"{name}: {text}",
            )


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
        assert ("value_loss" in metrics) == (CASES[case]["name"] in WITH_VALUE_MODEL)


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
    assert len(named) > 30
    assert named - reported == OF_THE_DRIVER


@pytest.mark.parametrize("case", ["adapters", "adapters in a trust region"])
def test_with_adapters_the_policys_own_weights_stay_as_they_are_bit_for_bit(case, results_of_two_ranks):
    for rank in results_of_two_ranks:
        saved = torch.load(rank[case]["parameters"], weights_only=True)
        trained = saved["trained"]
        moved = {name for name in trained if not torch.equal(trained[name], saved["start"][name])}
        of_policy = {name for name in moved if name.startswith("policy.")}
        assert of_policy == {name for name in trained if ".lora_A." in name or ".lora_B." in name}
        assert moved - of_policy, "the value model is trained in full"
        expected = sum(trained[name].numel() for name in of_policy)
        assert [metrics["num_trained_parameters"] for metrics in rank[case]["steps"]] == [expected] * 2


@pytest.mark.parametrize("case", ["trpo", "adapters in a trust region"])
def test_a_trust_region_step_stays_in_it_and_improves(case, results):
    for metrics in results[case]["steps"]:
        assert 0 < metrics["policy_step_kl"] <= 0.01
        assert metrics["policy_surrogate_improvement"] > 0
        assert metrics["policy_step_fraction"] in [0.5**attempt for attempt in range(10)]
        assert metrics["policy_loss"] == pytest.approx(-metrics["policy_surrogate_improvement"], abs=1e-5)
        assert metrics["num_updates"] == 4, "of the value model"
        assert "policy_learning_rate" not in metrics


@pytest.mark.long
def test_a_run_with_a_trust_region(train, lean):
    """What the step wrote is what rollout workers serve and what is exported."""
    overrides = [each for each in lean if not each.startswith("algorithm.")]
    run = train(*overrides, "run.num_steps=2", "algorithm={name: trpo}", "learner.zero_stage=0")
    assert run.returncode == 0, run.output
    assert len(run.metrics) == 2
    for metrics in run.metrics:
        assert 0 < metrics["policy_step_kl"] <= 0.01
        assert metrics["rollout_learner_gap_max"] < 1e-3
        assert metrics["probe_difference_max"] < 1e-4
    (policy,) = [each.removeprefix("policy.model=") for each in lean if each.startswith("policy.model=")]
    start = load_file(Path(policy) / "model.safetensors")
    exported = load_file(run.folder / "policy" / "model.safetensors")
    assert exported.keys() == start.keys()
    moved = max(float((exported[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-4


@pytest.mark.long
def test_a_run_with_a_penalty_for_the_divergence(train, lean):
    overrides = [each for each in lean if not each.startswith("algorithm.")]
    run = train(*overrides, "run.num_steps=2", "algorithm={name: ppo_kl, num_epochs: 2}")
    assert run.returncode == 0, run.output
    assert [metrics["step"] for metrics in run.metrics] == [0, 1]
    for metrics in run.metrics:
        assert metrics.keys() >= OF_THE_DRIVER
        assert metrics["policy_penalty_coef"] > 0
        assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-3)
