"""Scoring a batch: what can be scored is, and what cannot says why. Models are real, and small."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, Qwen2ForCausalLM
from transformers import Qwen2ForSequenceClassification as Qwen2Classifier

from rlhf_dist.engines.scorer_engine import ForwardPasses, ScorerEngine
from rlhf_dist.errors import RewardTimeoutError
from rlhf_dist.experience.schema import rollout_batch
from rlhf_dist.rewards.settings import FunctionRewardSettings, ModelRewardSettings
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm, save_tiny_reward_model
from rlhf_dist.types import Completion, GenerationRequest, VersionSpan

WORDS = ("good", "poison", "better", "the best of all there are")
MODEL = {"seed": 0, "num_layers": 1, "max_positions": 64}
FORWARD = ForwardPasses(64, "auto", torch.float32, torch.device("cpu"))

REWARDS = """
import math, threading

def length(prompts, responses, columns):
    return [float(len(response)) for response in responses]

def no_poison(prompts, responses, columns):
    if "poison" in responses:
        raise ValueError("poison")
    return length(prompts, responses, columns)

def nan_for_poison(prompts, responses, columns):
    return [math.nan if response == "poison" else 1.0 for response in responses]

def no_prompt_1(prompts, responses, columns):
    return [-1.0 / (answer != 1) for answer in columns["answer"]]

def one_score(prompts, responses, columns):
    return [float(len(responses[0]))]

def no_score(prompts, responses, columns):
    return []

def huge(prompts, responses, columns):
    return [1e38 if response == "poison" else 1.0 for response in responses]

def hangs_on_poison(prompts, responses, columns):
    if "poison" in responses:
        threading.Event().wait()
    return length(prompts, responses, columns)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reward model that give NaN to what has the token `poison` in it."""
    folder = tmp_path_factory.mktemp("models")
    corpus = [*WORDS[:3], "Say"] * 20
    save_tiny_causal_lm(folder / "policy", corpus, hidden_size=32, **MODEL)
    save_tiny_reward_model(folder / "reward", corpus, hidden_size=32, **MODEL)
    for name, model_class in (("policy", Qwen2ForCausalLM), ("reward", Qwen2Classifier)):
        (poison,) = AutoTokenizer.from_pretrained(folder / name)("poison")["input_ids"]
        model = model_class.from_pretrained(folder / name)
        if name == "policy":  # a head of its own, or NaN would be in every token's probability
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            model.get_input_embeddings().weight[poison] = math.nan
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def rollouts(models):
    """Four prompts, the second of which got the response `poison`."""
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    prompts = pa.table(
        {"prompt": ["Say"] * 4, "columns": [json.dumps({"answer": ordinal}) for ordinal in range(4)]}
    )
    completions = []
    for ordinal, word in enumerate(WORDS):
        request = GenerationRequest(ordinal, 0, ordinal, 7, tokenizer("Say ")["input_ids"], 1_000_000)
        tokens = [*tokenizer(word)["input_ids"], tokenizer.eos_token_id]
        spans = (VersionSpan(0, 0, len(tokens)),)
        logprobs = [-1.0] * len(tokens)
        completions.append(Completion(request, word, tokens, logprobs, spans, "stop", 2_000_000))
    return rollout_batch(completions, producer="rollout worker 0", prompts=prompts)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Settings of a function above."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "odd_scores.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    yield lambda name, **more: FunctionRewardSettings(path=f"odd_scores:{name}", **more)
    sys.path.remove(str(folder))


def score(models, rollouts, *rewards, reference=False):
    policy = str(models / "policy")
    engine = ScorerEngine(
        rewards, reference_model=policy if reference else None, policy_model=policy, forward=FORWARD
    )
    return engine.score(rollouts, temperature=1.0, scorer="scoring worker 0")


def responses(scored):
    return scored.batch["response"].to_pylist()


def test_what_can_be_scored_is_scored_in_its_order(models, rollouts, rewards):
    scored = score(models, rollouts, rewards("length"), rewards("one_score", weight=2.0))
    assert scored.failed == {}
    assert responses(scored) == list(WORDS)
    assert scored.batch["reward"].to_pylist() == [3.0 * len(word) for word in WORDS]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_poison", "raised ValueError: poison ("),
        ("no_prompt_1", "raised ZeroDivisionError: float division by zero ("),
        ("nan_for_poison", "returned nan; scores must be finite, in float32"),
    ],
)
def test_a_sample_that_a_function_cannot_score_fails_alone(models, rollouts, rewards, name, reason):
    scored = score(models, rollouts, rewards("length"), rewards(name))
    assert responses(scored) == ["good", "better", WORDS[3]]
    assert scored.batch["reward_parts"].to_pylist()[1][0] == ("length", 6.0)
    assert list(scored.failed) == [1]
    assert scored.failed[1].startswith(f"reward function 'odd_scores:{name}' {reason}")
    assert "\n" not in scored.failed[1]


def test_where_all_samples_fail_there_is_no_batch(models, rollouts, rewards):
    scored = score(models, rollouts, rewards("length"), rewards("no_score"), reference=True)
    assert scored.batch is None
    reason = "reward function 'odd_scores:no_score' returned 0 scores for 1 sample"
    assert scored.failed == dict.fromkeys(range(4), reason)


def test_of_several_parts_the_first_one_that_failed_gives_the_reason(models, rollouts, rewards):
    scored = score(models, rollouts, rewards("nan_for_poison"), rewards("no_poison"), rewards("no_prompt_1"))
    assert responses(scored) == ["good", "better", WORDS[3]]
    assert "nan_for_poison" in scored.failed[1]


def test_a_sum_that_is_not_finite_fails(models, rollouts, rewards):
    scored = score(models, rollouts, rewards("huge", weight=10.0))
    assert responses(scored) == ["good", "better", WORDS[3]]
    assert scored.failed == {1: "the weighted sum of the rewards is 1e+39, which is not finite in float32"}


def test_a_function_that_hangs_is_no_samples_failure(models, rollouts, rewards):
    with pytest.raises(
        RewardTimeoutError, match=r"'odd_scores:hangs_on_poison' did not return within 0\.2 s"
    ):
        score(models, rollouts, rewards("hangs_on_poison", timeout_s=0.2))


def test_a_logit_that_is_not_finite_fails_its_sample_alone(models, rollouts, rewards):
    reward = ModelRewardSettings(kind="model", model=str(models / "reward"))
    clean = score(models, rollouts.take([0, 2, 3]), reward)
    scored = score(models, rollouts, rewards("length"), reward)
    assert responses(scored) == ["good", "better", WORDS[3]]
    reason = f"reward model '{reward.model}' returned nan; scores must be finite, in float32"
    assert scored.failed == {1: reason}
    parts = [dict(parts)["model"] for parts in scored.batch["reward_parts"].to_pylist()]
    np.testing.assert_allclose(parts, clean.batch["reward"].to_numpy(), rtol=1e-5)


def test_a_sample_that_a_reward_model_cannot_take_fails_alone(models, rollouts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    tokenizer.chat_template = None
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scored = score(models, rollouts, ModelRewardSettings(kind="model", model=str(tmp_path)))
    assert responses(scored) == list(WORDS[:3])
    assert "raised IndexError: index out of range" in scored.failed[3]


def test_a_reference_that_is_not_finite_fails_its_sample_alone(models, rollouts, rewards):
    clean = score(models, rollouts.take([0, 2, 3]), rewards("length"), reference=True)
    scored = score(models, rollouts, rewards("length"), reference=True)
    assert responses(scored) == ["good", "better", WORDS[3]]
    assert scored.failed == {1: "the reference model gave a log-probability that is not finite"}
    np.testing.assert_allclose(
        scored.batch["ref_logprobs"].flatten(), clean.batch["ref_logprobs"].flatten(), rtol=1e-4
    )
