"""A run that trains adapters only: what reaches the engines is proved, what is left loads everywhere."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_dist.errors import ConfigError, ModelError

ADAPTERS = "learner.lora={rank: 4, alpha: 8}"
LEARNING_RATE = "learner.policy_optimizer.learning_rate=1e-2"


@pytest.fixture(scope="module")
def run(train, lean):
    """Three steps. That a learner goes on from a checkpoint of adapters is shown without a whole run."""
    return train(*lean, ADAPTERS, LEARNING_RATE)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_engine_and_learner_agree_after_every_update(run):
    """The engines have merged weights, the learner answers the probe with its adapters beside them."""
    assert run.returncode == 0, run.output
    assert [metrics["step"] for metrics in run.metrics] == [0, 1, 2]
    for metrics in run.metrics:
        assert metrics["probe_difference_max"] <= 1e-4
        assert metrics["rollout_learner_gap_max"] <= 1e-4
        assert metrics["policy_ratio_max"] > 1.01, "the weights did change"
        assert 0 <= metrics["reward_mean"] <= 1


def test_the_exported_policy_is_the_first_one_with_its_adapters(run, lean):
    (start,) = [each.removeprefix("policy.model=") for each in lean if each.startswith("policy.model=")]
    start, policy = load(start), load(run.folder / "policy")
    with_adapters = AutoPeftModelForCausalLM.from_pretrained(
        run.folder / "policy-adapter", dtype=torch.float32
    )
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        before, merged, beside = (model(tokens).logits for model in (start, policy, with_adapters))
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 0.01
    trained = sum(each.numel() for name, each in with_adapters.named_parameters() if ".lora_" in name)
    assert {metrics["num_trained_parameters"] for metrics in run.metrics} == {trained}
    assert trained < sum(each.numel() for each in policy.parameters()) / 10


def test_a_checkpoint_has_no_weights_that_are_not_trained(run):
    checkpoint = run.folder / "checkpoints" / "step-000003"
    for kind in ("parameters", "exp_avg", "exp_avg_sq"):
        saved = load_file(checkpoint / "policy" / f"{kind}.safetensors")
        assert saved.keys() == {name for name in saved if "_proj.lora_" in name}
        assert any(name.endswith("_proj.lora_B.default.weight") for name in saved)


def test_a_checkpoint_of_other_adapters_is_refused(run, train, lean, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    refused = train(*lean, "learner.lora={rank: 8}", "run.num_steps=4", "--resume", folder=folder)
    assert refused.returncode == ConfigError.exit_code
    assert '"rank": 4' in refused.output
    assert "starting workers" not in refused.output


def test_a_layer_that_is_not_there_is_found_before_a_worker_starts(train):
    run = train("learner.lora={target_modules: [q_porj]}")
    assert run.returncode == ModelError.exit_code
    assert "did you mean 'q_proj'?" in " ".join(run.output.split())
    assert "starting workers" not in run.output
