"""A real vLLM worker: what it serves after an update, how it proves it, and what it refuses."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cluster import rollout_pool
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.placement import share_out
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.segment_copy import copy_to_object_store
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.config import ClusterSettings
from rlhf_dist.data.prompts import load_prompts
from rlhf_dist.data.settings import DataSettings
from rlhf_dist.engines.settings import RolloutSettings, SamplingSettings
from rlhf_dist.errors import WeightsError
from rlhf_dist.tasks.support_desk import make_policy
from rlhf_dist.types import Probe, PromptAttempt, PublishedWeights
from rlhf_dist.weights.certificate import probe_tokens
from rlhf_dist.weights.segment import HEADER_BYTES
from rlhf_dist.weights.shared_memory import SharedMemoryPublisher
from rlhf_dist.weights.snapshot import snapshot_bytes

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
    """Two workers on two nodes of Ray. This process, which stands for the learner, is on the first node."""
    folder, _ = policy
    settings = RolloutSettings(
        num_workers=2,
        cpus_per_worker=1,
        threads_per_worker=1,
        samples_per_prompt=2,
        samples_per_batch=4,
        sampling=SamplingSettings(max_tokens=12),
    )
    prompts = load_prompts(
        DataSettings(prompts="task:support-desk", limit=8),
        AutoTokenizer.from_pretrained(folder),
        max_prompt_tokens=64,
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    with ray_session(cluster.address, verbose=False):
        (share,) = share_out({"rollout": settings}, node_cpus=1)
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
            deterministic=False,
        )
        events, started = Events(), []
        for index in range(len(workers)):
            workers.start(events, index, partial(started.append, index))
        events.wait_until(lambda: len(started) == len(workers))
        yield workers
        workers.end()
    cluster.shutdown()


@torch.no_grad()
def logprobs_of(model, tokens, temperature=1.0):
    """Log-probabilities of tokens 1.. given those before, by plain transformers."""
    logits = model(torch.tensor([tokens])).logits[0, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def publish(policy):
    """Stands for the learner: writes a snapshot of the model into shared memory of this process."""
    _, model = policy
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    publisher = SharedMemoryPublisher(snapshot_bytes(each.nbytes for each in names), num_threads=2)

    def write(version):
        tokens = probe_tokens(model.config.vocab_size, CONTEXT_TOKENS)
        probe = Probe(tokens, tuple(logprobs_of(model, list(tokens)).tolist()))
        bucket = [(tuple(its_names), parameter) for parameter, its_names in names.items()]
        written = publisher.publish(version, [bucket], probe)
        node = ray.get_runtime_context().get_node_id()
        return PublishedWeights(*written, node, probe_s=0, write_s=0)

    return write


@torch.no_grad()
def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def answers(pool, rows):
    """A worker's greedy responses."""
    events, got = Events(), []
    pool.answer(events, 0, rows, got.append)
    events.wait_until(lambda: bool(got))
    return got[0]


def load(pool, published):
    """Every worker's proof of a snapshot."""
    events, proofs = Events(), []
    pool.load_weights(events, published, proofs.append)
    events.wait_until(lambda: len(proofs) == len(pool))
    return sorted(proofs, key=lambda proof: proof.worker)


@pytest.fixture(scope="module")
def generate(pool):
    """Rollouts of (ordinal, row) pairs, in the order (ordinal, sample)."""
    events, batches = Events(), []
    for index in range(len(pool)):
        pool.listen(events, index, lambda batch, _: batches.append(ray.get(batch)))

    def generate(prompts):
        batches.clear()
        attempts = [(PromptAttempt(ordinal, 0, (0, 1)), row) for ordinal, row in prompts]
        for index in range(len(pool)):
            pool.generate(events, index, attempts[index :: len(pool)], TEMPERATURE)
        events.wait_until(lambda: sum(batch.num_rows for batch in batches) == 2 * len(prompts))
        table = pa.Table.from_batches(batches).sort_by([("ordinal", "ascending"), ("sample", "ascending")])
        return table.to_pylist()

    return generate


def test_five_updates_are_served_and_proved(pool, policy, publish):
    _, model = policy
    before = publish(0).manifest.probe
    for version in range(1, 6):
        disturb(model, seed=version)
        published = publish(version)
        moved = np.abs(np.subtract(published.manifest.probe.logprobs, before.logprobs)).max()
        assert moved > 1e-2, "the update would show"
        proofs = load(pool, published)
        assert [proof.worker for proof in proofs] == ["rollout worker 0", "rollout worker 1"]
        assert [proof.version for proof in proofs] == [version, version]
        assert max(proof.max_abs_difference for proof in proofs) <= 1e-4


def test_only_the_other_node_gets_the_bytes_through_the_object_store(pool, policy, publish, monkeypatch):
    _, model = policy
    copies = []

    def copy(published):
        copies.append(copy_to_object_store(published))
        return copies[-1]

    monkeypatch.setattr(rollout_pool, "copy_to_object_store", copy)
    disturb(model, seed=20)
    published = publish(5)
    size = published.segment.num_bytes
    load(pool, published)
    assert len(copies) == 1
    (payload,) = copies
    assert ray.get(payload).nbytes == size == snapshot_bytes(each.nbytes for each in model.parameters())
    nodes = ray.experimental.get_object_locations([payload])[payload]["node_ids"]
    assert len(nodes) == 2, "made on the learner's node, pulled by the other"


def test_every_token_has_its_logprob_and_version(pool, policy, publish, generate):
    _, model = policy
    load(pool, publish(6))
    rows = generate([(ordinal, ordinal % 8) for ordinal in range(6)])
    assert [(row["ordinal"], row["sample"]) for row in rows] == [(o, s) for o in range(6) for s in range(2)]
    for row in rows:
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        expected = logprobs_of(model, prompt + response, TEMPERATURE)[len(prompt) - 1 :]
        assert np.abs(expected.numpy() - np.array(row["rollout_logprobs"])).max() <= 1e-4
        assert row["version_spans"] == [{"version": 6, "start": 0, "end": len(response)}]
        assert (row["oldest_version"], row["newest_version"]) == (6, 6)
        assert row["submitted_at"] < row["finished_at"]
        assert row["finish_reason"] in ("stop", "length")
        assert len(response) <= 12
    assert len({tuple(row["response_tokens"]) for row in rows}) > 6, "samples of a prompt differ"


def test_a_request_draws_the_same_tokens_whatever_runs_beside_it(generate):
    many = generate([(ordinal, ordinal) for ordinal in range(8)])
    few = generate([(5, 5), (2, 2)])
    by_sample = {(row["ordinal"], row["sample"]): row["response_tokens"] for row in many}
    for row in few:
        assert row["response_tokens"] == by_sample[row["ordinal"], row["sample"]]


def test_damaged_bytes_are_refused_and_the_old_weights_stay(pool, policy, publish):
    _, model = policy
    load(pool, publish(7))
    before = answers(pool, [0, 1])
    disturb(model, seed=8)
    published = publish(8)
    entry = published.manifest.tensors[3]
    with open(published.segment.path, "r+b") as memory:
        memory.seek(HEADER_BYTES + entry.offset)
        byte = memory.read(1)[0]
        memory.seek(HEADER_BYTES + entry.offset)
        memory.write(bytes([byte ^ 1]))
    with pytest.raises(WeightsError, match=entry.name):
        load(pool, published)
    assert answers(pool, [0, 1]) == before
    assert {proof.version for proof in load(pool, publish(8))} == {8}, "the workers go on"


def test_a_mismatch_is_refused_with_both_numbers(pool, publish):
    published = publish(9)
    probe = published.manifest.probe
    wrong = list(probe.logprobs)
    wrong[4] -= 0.25
    lie = dataclasses.replace(published.manifest, probe=Probe(probe.tokens, tuple(wrong)))
    with pytest.raises(WeightsError) as error:
        load(pool, dataclasses.replace(published, manifest=lie))
    assert f"{probe.logprobs[4]:.3f}" in str(error.value)
    assert f"{wrong[4]:.3f}" in str(error.value)
    assert "policy version 9" in str(error.value)


def test_a_tied_head_that_was_left_out_does_not_pass(pool, policy, publish):
    _, model = policy
    disturb(model, seed=10)
    published = publish(10)
    kept = tuple(entry for entry in published.manifest.tensors if entry.name != "lm_head.weight")
    assert len(kept) == len(published.manifest.tensors) - 1
    headless = dataclasses.replace(published.manifest, tensors=kept)
    with pytest.raises(WeightsError, match="does not serve the weights of policy version 10"):
        load(pool, dataclasses.replace(published, manifest=headless))
    proofs = load(pool, published)
    assert max(proof.max_abs_difference for proof in proofs) <= 1e-4, "the whole snapshot mends it"


def test_a_snapshot_that_was_overwritten_is_refused(pool, publish):
    late = publish(11)
    publish(12), publish(13)
    with pytest.raises(WeightsError, match="weight snapshot version 11 was overwritten"):
        load(pool, late)
