"""The learner group on its own: however a batch is cut it learns the same, and what a plain PPO learns."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from simple_ppo import Sample, SimplePPO
from transformers import AutoConfig

from rlhf_dist.algorithms.ppo import Settings
from rlhf_dist.cluster.calls import wait_for_all
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.placement import share_out
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import LearnerSettings, OptimizerSettings, ValueOptimizerSettings
from rlhf_dist.experience.schema import rollout_batch, scored_batch
from rlhf_dist.tasks.support_desk import make_policy
from rlhf_dist.types import Completion, GenerationRequest
from rlhf_dist.weights.certificate import probe_tokens
from rlhf_dist.weights.snapshot import named_tensors

NUM_SAMPLES = 13
# A large eps keeps Adam from turning rounding of a tiny gradient into a whole step.
POLICY_OPTIMIZER = OptimizerSettings(learning_rate=3e-3, eps=1e-2)
VALUE_OPTIMIZER = ValueOptimizerSettings(learning_rate=1e-2, eps=1e-2)
ALGORITHM = Settings(num_epochs=4, lam=0.9, gamma=0.98, kl={"coef": 0.1})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder, seed=0)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session(None, verbose=False):
        yield


def experience(seed, vocab_size):
    """A scored batch of ragged samples, as scoring workers make them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 24, size=NUM_SAMPLES)
    completions, references = [], []
    for i, length in enumerate(lengths):
        prompt = generator.integers(3, vocab_size, size=generator.integers(4, 15)).tolist()
        tokens = generator.integers(3, vocab_size, size=length).tolist()
        completions.append(
            Completion(
                request=GenerationRequest(i, 0, 0, seed, prompt),
                text="",
                tokens=tokens,
                logprobs=[-6.0] * length,
                policy_versions=[seed] * length,
                finish_reason="stop",
            )
        )
        references.append(generator.normal(-6.3, 0.3, size=length).astype(np.float32))
    prompts = pa.table({"prompt": [""], "columns": [json.dumps({})]})
    rewards = generator.random(NUM_SAMPLES).tolist()
    rollouts = rollout_batch(completions, producer="test", prompts=prompts)
    return scored_batch(rollouts, rewards=rewards, reward_parts={"r": rewards}, ref_logprobs=references)


def learn(policy, *, num_ranks, zero_stage, max_tokens, num_steps=1, algorithm=ALGORITHM):
    """The metrics of each step and the policy's parameters after the last."""
    settings = LearnerSettings(
        num_workers=num_ranks,
        zero_stage=zero_stage,
        max_tokens_per_micro_batch=max_tokens,
        policy_optimizer=POLICY_OPTIMIZER,
        value_optimizer=VALUE_OPTIMIZER,
    )
    (share,) = share_out({"learner": settings}, node_cpus=2)
    group = LearnerGroup(share, ClusterSettings())
    try:
        models = {"policy_model": str(policy), "value_model": str(policy)}
        wait_for_all(group.start(settings, algorithm, num_steps=num_steps, seed=0, **models), 120)
        vocab_size = AutoConfig.from_pretrained(policy).vocab_size
        metrics = []
        for step in range(num_steps):
            batch = ray.put(experience(step, vocab_size))
            metrics.append(group.step([batch], step, 1.0))
        manifest, payload = group.publish(num_steps, probe_tokens(vocab_size, 64))
        tensors = named_tensors(manifest, ray.get(payload))
        return metrics, {name: tensor.clone() for name, tensor in tensors}
    finally:
        group.end()


@pytest.fixture(scope="module")
def whole(policy):
    """One rank, one micro-batch a pass."""
    return learn(policy, num_ranks=1, zero_stage=0, max_tokens=100_000)


@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "max_tokens"),
    [(1, 0, 64), (2, 0, 100_000), (2, 1, 64), (2, 2, 48), (2, 3, 64)],
)
def test_invariance_to_how_the_batch_is_cut(policy, whole, num_ranks, zero_stage, max_tokens):
    (expected,), parameters = whole
    (metrics,), cut = learn(policy, num_ranks=num_ranks, zero_stage=zero_stage, max_tokens=max_tokens)
    for name in ("policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm", "policy_clip_fraction"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6), name
    assert cut.keys() == parameters.keys()
    for name, tensor in parameters.items():
        torch.testing.assert_close(
            cut[name], tensor, rtol=0, atol=5e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_minibatches_are_cut_the_same_on_any_number_of_ranks(policy):
    algorithm = ALGORITHM.model_copy(update={"num_minibatches": 3})
    (one,), parameters = learn(policy, num_ranks=1, zero_stage=0, max_tokens=64, algorithm=algorithm)
    (two,), cut = learn(policy, num_ranks=2, zero_stage=2, max_tokens=64, algorithm=algorithm)
    assert two["policy_loss"] == pytest.approx(one["policy_loss"], rel=2e-4)
    for name, tensor in parameters.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=2e-5)


def test_an_independent_ppo_learns_the_same_through_five_steps(policy):
    num_steps = 5
    metrics, parameters = learn(policy, num_ranks=2, zero_stage=2, max_tokens=64, num_steps=num_steps)
    plain = SimplePPO(
        policy,
        lr=POLICY_OPTIMIZER.learning_rate,
        value_lr=VALUE_OPTIMIZER.learning_rate,
        eps=POLICY_OPTIMIZER.eps,
        gamma=0.98,
        lam=0.9,
        kl_coef=0.1,
        clip=0.2,
        value_clip=0.2,
        num_epochs=4,
    )
    start = {name: tensor.clone() for name, tensor in plain.policy.named_parameters()}
    for step in range(num_steps):
        rows = experience(step, plain.policy.config.vocab_size).to_pylist()
        samples = [
            Sample(row["prompt_tokens"], row["response_tokens"], row["ref_logprobs"], row["reward"])
            for row in rows
        ]
        for name, value in plain.step(samples).items():
            assert metrics[step][name] == pytest.approx(value, rel=2e-3, abs=2e-5), (step, name)
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in plain.policy.named_parameters())
    assert moved > 1e-3
    for name, tensor in plain.policy.named_parameters():
        torch.testing.assert_close(parameters[name], tensor.detach(), rtol=0, atol=2e-5)
