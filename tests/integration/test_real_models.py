"""Hugging Face folders for every role and prompts from a file: the path a real model takes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm, save_tiny_reward_model

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl.gz"
pytestmark = pytest.mark.skipif(not GSM8K.exists(), reason=f"no GSM8K data at {GSM8K}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reward model on disk, each with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(300)]
    corpus = [f"{row['question']}\n{row['answer']}" for row in rows]
    save_tiny_causal_lm(folder / "policy", corpus, seed=0, vocab_size=900, max_positions=512)
    save_tiny_reward_model(folder / "reward", corpus[:100], seed=1, vocab_size=500, max_positions=512)
    return folder


@pytest.fixture
def config(models, tmp_path):
    path = tmp_path / "gsm8k.yaml"
    tree = {
        "run": {"dir": "unused", "num_steps": 2, "num_sample_answers": 1},
        "policy": {"model": str(models / "policy")},
        "reward": [
            {"kind": "function", "path": "rlhf_dist.tasks.gsm8k:reward", "weight": 1.0, "name": "gsm8k"},
            {"kind": "model", "model": str(models / "reward"), "weight": 0.1, "name": "classifier"},
        ],
        "data": {"prompts": str(GSM8K), "prompt_column": "question", "limit": 200, "over_limit": "skip"},
        "sft": {
            "demonstrations": str(GSM8K),
            "prompt_column": "question",
            "response_column": "answer",
            "limit": 200,
            "over_limit": "skip",
            "num_steps": 5,
            "batch_size": 8,
            "learning_rate": 1e-3,
        },
        "rollout": {
            "num_workers": 1,
            "prompts_per_step": 6,
            "samples_per_prompt": 2,
            "sampling": {"max_tokens": 32, "temperature": 1.0, "temperature_final": 0.8},
        },
        "scoring": {"num_workers": 2},
        "learner": {"num_workers": 2, "zero_stage": 3},
        "algorithm": {"name": "ppo", "num_epochs": 2, "num_minibatches": 2},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def test_gsm8k_prompts_with_two_rewards_and_models_from_disk(train, config):
    run = train(config=config)
    assert run.returncode == 0, run.output
    first, last = run.metrics
    for step in (first, last):
        parts = step["reward_part_gsm8k"], step["reward_part_classifier"]
        assert step["reward_mean"] == pytest.approx(parts[0] + 0.1 * parts[1], abs=1e-6)
        assert 0 <= parts[0] <= 1
        assert parts[1] != 0
        assert step["num_samples"] == 12
        assert step["rollout_learner_gap_max"] <= 1e-4, "at either temperature"
        assert step["probe_difference_max"] <= 1e-4
    assert (first["temperature"], last["temperature"]) == (1.0, 0.8)
    (prompt,) = json.loads((run.folder / "answers.json").read_text())["prompts"]
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        assert prompt == json.loads(next(file))["question"]


@pytest.mark.long
def test_a_policy_is_no_reward_model(train, config, models):
    run = train(f"reward.1.model={models / 'policy'}", "sft=null", config=config)
    assert run.returncode == 4
    assert "is not a sequence classifier" in run.output
    assert "Traceback" not in run.output
