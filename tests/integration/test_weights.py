"""A real vLLM worker: what it serves after an update, how it proves it, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cluster.calls import wait_for_all
from rlhf_dist.cluster.placement import share_out
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.config import ClusterSettings
from rlhf_dist.data.prompts import load_prompts
from rlhf_dist.data.settings import DataSettings
from rlhf_dist.engines.settings import RolloutSettings, SamplingSettings
from rlhf_dist.errors import WeightsError
from rlhf_dist.tasks.support_desk import make_policy
from rlhf_dist.types import Probe
from rlhf_dist.weights.certificate import probe_tokens
from rlhf_dist.weights.snapshot import take_snapshot

CONTEXT_TOKENS = 96
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A small policy with tied embeddings, as a folder and as the model that stands for the learner."""
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    return folder, model


@pytest.fixture(scope="module")
def pool(policy):
    folder, _ = policy
    settings = RolloutSettings(
        num_workers=1, samples_per_prompt=2, samples_per_batch=4, sampling=SamplingSettings(max_tokens=12)
    )
    prompts = load_prompts(
        DataSettings(prompts="task:support-desk", limit=8),
        AutoTokenizer.from_pretrained(folder),
        max_prompt_tokens=64,
    )
    with ray_session(None, verbose=False):
        (share,) = share_out({"rollout": settings}, node_cpus=2)
        workers = RolloutPool(
            settings,
            share,
            ClusterSettings(),
            prompts.table,
            model=str(folder),
            dtype="float32",
            context_tokens=CONTEXT_TOKENS,
            probe_tolerance_nats=1e-4,
            seed=3,
        )
        wait_for_all(workers.start(), timeout_s=120)
        yield workers
        workers.end()


@torch.no_grad()
def logprobs_of(model, tokens, temperature=1.0):
    """Log-probabilities of tokens 1.. given those before, by plain transformers."""
    logits = model(torch.tensor([tokens])).logits[0, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def snapshot_of(model, version):
    tokens = probe_tokens(model.config.vocab_size, CONTEXT_TOKENS)
    probe = Probe(tokens, tuple(logprobs_of(model, list(tokens)).tolist()))
    return take_snapshot(version, model.named_parameters(remove_duplicate=False), probe)


@torch.no_grad()
def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def generate(pool, prompts):
    """Rollouts of (ordinal, row) pairs, in the order (ordinal, sample)."""
    batches = [ray.get(batch) for batch, _ in pool.generate(prompts, TEMPERATURE)]
    table = pa.Table.from_batches(batches).sort_by([("ordinal", "ascending"), ("sample", "ascending")])
    return table.to_pylist()


def test_five_updates_are_served_and_proved(pool, policy):
    _, model = policy
    before = snapshot_of(model, 0)[0].probe
    for version in range(1, 6):
        disturb(model, seed=version)
        manifest, payload = snapshot_of(model, version)
        moved = np.abs(np.subtract(manifest.probe.logprobs, before.logprobs)).max()
        assert moved > 1e-2, "the update would show"
        (served,) = pool.load_weights(manifest, ray.put(payload))
        assert served.version == version
        assert served.max_abs_difference <= 1e-4


def test_every_token_has_its_logprob_and_version(pool, policy):
    _, model = policy
    pool.load_weights(*_published(model, 6))
    rows = generate(pool, [(ordinal, ordinal % 8) for ordinal in range(6)])
    assert [(row["ordinal"], row["sample"]) for row in rows] == [(o, s) for o in range(6) for s in range(2)]
    for row in rows:
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        expected = logprobs_of(model, prompt + response, TEMPERATURE)[len(prompt) - 1 :]
        assert np.abs(expected.numpy() - np.array(row["rollout_logprobs"])).max() <= 1e-4
        assert row["policy_versions"] == [6] * len(response)
        assert row["finish_reason"] in ("stop", "length")
        assert len(response) <= 12
    assert len({tuple(row["response_tokens"]) for row in rows}) > 6, "samples of a prompt differ"


def test_a_request_draws_the_same_tokens_whatever_runs_beside_it(pool):
    many = generate(pool, [(ordinal, ordinal) for ordinal in range(8)])
    few = generate(pool, [(5, 5), (2, 2)])
    by_sample = {(row["ordinal"], row["sample"]): row["response_tokens"] for row in many}
    for row in few:
        assert row["response_tokens"] == by_sample[row["ordinal"], row["sample"]]


def test_damaged_bytes_are_refused_and_the_old_weights_stay(pool, policy):
    _, model = policy
    pool.load_weights(*_published(model, 7))
    before = pool.answer([0, 1])
    manifest, payload = snapshot_of(model, 8)
    payload[3] = payload[3].copy()
    payload[3][0] ^= 1
    with pytest.raises(WeightsError, match=manifest.tensors[3].name):
        pool.load_weights(manifest, ray.put(payload))
    assert pool.answer([0, 1]) == before


def test_a_mismatch_is_refused_with_both_numbers(pool, policy):
    _, model = policy
    manifest, payload = snapshot_of(model, 9)
    wrong = list(manifest.probe.logprobs)
    wrong[4] -= 0.25
    lie = dataclasses.replace(manifest, probe=Probe(manifest.probe.tokens, tuple(wrong)))
    with pytest.raises(WeightsError) as error:
        pool.load_weights(lie, ray.put(payload))
    assert f"{manifest.probe.logprobs[4]:.3f}" in str(error.value)
    assert f"{wrong[4]:.3f}" in str(error.value)
    assert "policy version 9" in str(error.value)


def test_a_tied_head_that_was_left_out_does_not_pass(pool, policy):
    _, model = policy
    disturb(model, seed=10)
    manifest, payload = snapshot_of(model, 10)
    kept = [i for i, entry in enumerate(manifest.tensors) if entry.name != "lm_head.weight"]
    assert len(kept) == len(payload) - 1
    headless = dataclasses.replace(manifest, tensors=tuple(manifest.tensors[i] for i in kept))
    with pytest.raises(WeightsError, match="does not serve the weights of policy version 10"):
        pool.load_weights(headless, ray.put([payload[i] for i in kept]))
    (served,) = pool.load_weights(manifest, ray.put(payload))
    assert served.max_abs_difference <= 1e-4, "the whole snapshot mends it"


def _published(model, version):
    manifest, payload = snapshot_of(model, version)
    return manifest, ray.put(payload)
