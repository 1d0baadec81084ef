"""The learner group on its own: however a batch is cut it learns the same, and what a plain PPO learns."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file
from simple_ppo import Sample, SimplePPO
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_dist.algorithms.ppo import Settings
from rlhf_dist.cluster import learner_group
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.experience_queue import LeasedBatch
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.learner_worker import LearnerWorker
from rlhf_dist.cluster.placement import share_out
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import (
    LearnerSettings,
    LoRASettings,
    OptimizerSettings,
    ValueOptimizerSettings,
)
from rlhf_dist.errors import RunError, WorkerError
from rlhf_dist.experience.schema import rollout_batch, scored_batch
from rlhf_dist.tasks.support_desk import make_policy
from rlhf_dist.types import BatchPlace, BatchRows, Completion, GenerationRequest, VersionSpan
from rlhf_dist.weights.certificate import probe_tokens
from rlhf_dist.weights.shared_memory import SharedMemoryReceiver

TOTAL_LENGTHS = (20, 20, 18, 14, 13, 12, 12, 11, 11, 10, 10, 9, 8)
"""Prompt and response tokens of the samples. Neighbours differ by so little that padded batches take them
together, at most 5 % of which may be padding, and by so much that 3.4 % is."""
NUM_SAMPLES = len(TOTAL_LENGTHS)
MASKED_SHARE = 0.25
# A large eps keeps Adam from turning rounding of a tiny gradient into a whole step.
POLICY_OPTIMIZER = OptimizerSettings(learning_rate=3e-3, eps=1e-2)
VALUE_OPTIMIZER = ValueOptimizerSettings(learning_rate=1e-2, eps=1e-2)
ALGORITHM = Settings(num_epochs=4, lam=0.9, gamma=0.98, kl={"coef": 0.1})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def group_of():
    """A group by its number of ranks: the processes stay, and start as one learner after the other."""

    class Rank(LearnerWorker):
        has_joined = False

        def start(self, *args, **kwargs):
            from rlhf_dist.engines import deepspeed_engine

            deepspeed_engine.GATHER_BUCKET_ELEMENTS = 20_000  # ZeRO-3 gathers the policy in a dozen buckets
            super().start(*args, **kwargs)

        def _join(self, *args):
            if not self.has_joined:
                super()._join(*args)
            self.has_joined = True

    groups = {}

    def get(num_ranks):
        if num_ranks not in groups:
            settings = LearnerSettings(num_workers=num_ranks, cpus_per_worker=0.5)
            (share,) = share_out({f"learner-{num_ranks}": settings}, node_cpus=2)
            groups[num_ranks] = LearnerGroup(share, ClusterSettings())
        return groups[num_ranks]

    with pytest.MonkeyPatch.context() as patch, ray_session(None, verbose=False):
        patch.setattr(learner_group, "LearnerWorker", Rank)
        yield get
        for group in groups.values():
            group.end()


def experience(seed, vocab_size, *, reward_scale=1.0):
    """A scored batch of ragged samples, as scoring workers make them, with tokens of an environment.

    One sample has no other tokens. No policy chose them, and where their log-probabilities belong is NaN.
    """
    generator = np.random.default_rng(seed)
    completions, references, masks = [], [], []
    for i, total in enumerate(generator.permutation(TOTAL_LENGTHS)):
        length = int(generator.integers(2, total - 2))
        mask = generator.random(length) > (MASKED_SHARE if i > 0 else 1)
        mask[generator.integers(length)] = i > 0
        prompt = generator.integers(3, vocab_size, size=total - length).tolist()
        tokens = generator.integers(3, vocab_size, size=length).tolist()
        completions.append(
            Completion(
                request=GenerationRequest(i, 0, 0, seed, prompt, submitted_at_us=0),
                text="",
                tokens=tokens,
                logprobs=np.where(mask, -6.0, np.nan).tolist(),
                version_spans=(VersionSpan(seed, 0, length),),
                finish_reason="stop",
                finished_at_us=0,
            )
        )
        masks.append(mask.astype(np.uint8))
        references.append(np.where(mask, generator.normal(-6.3, 0.3, size=length), np.nan).astype(np.float32))
    prompts = pa.table({"prompt": [""], "columns": [json.dumps({})]})
    rewards = (reward_scale * generator.random(NUM_SAMPLES)).tolist()
    rollouts = rollout_batch(completions, producer="test", prompts=prompts)
    place = rollouts.schema.get_field_index("response_mask")
    rollouts = rollouts.set_column(place, rollouts.schema.field(place), pa.array(masks, pa.list_(pa.uint8())))
    return scored_batch(
        rollouts,
        rewards=rewards,
        reward_parts={"r": rewards},
        ref_logprobs=references,
        scorer="test",
        scored_at_us=0,
    )


def learn(
    group_of,
    policy,
    *,
    num_ranks,
    zero_stage,
    max_tokens,
    batching="packed",
    num_steps=1,
    algorithm=ALGORITHM,
    lora=None,
    reward_scale=1.0,
    first_step=0,
    load=None,
    save=None,
):
    """The metrics of each step and the policy's parameters after the last.

    Args:
        load, save: folders of a checkpoint, read before the first step and written after the last.
    """
    settings = LearnerSettings(
        num_workers=num_ranks,
        zero_stage=zero_stage,
        max_tokens_per_micro_batch=max_tokens,
        batching=batching,
        policy_optimizer=POLICY_OPTIMIZER,
        value_optimizer=VALUE_OPTIMIZER,
        lora=lora,
    )
    group, events = group_of(num_ranks), Events()
    arguments = {"policy_model": str(policy), "value_model": str(policy), "journal": policy}
    group.start(events, settings, algorithm, num_steps=num_steps, seed=0, **arguments)
    vocab_size = AutoConfig.from_pretrained(policy).vocab_size
    metrics = []
    if load:
        group.load(events, load)
    for step in range(first_step, num_steps):
        rows = BatchRows(BatchPlace("segment", step), tuple(range(NUM_SAMPLES)))
        batch = LeasedBatch(rows, [ray.put(experience(step, vocab_size, reward_scale=reward_scale))])
        metrics.append(group.step(events, [batch], step, 1.0))
    if save:
        group.save(events, save)
    published = group.publish(events, num_steps, probe_tokens(vocab_size, 64))
    with SharedMemoryReceiver().receive(published) as tensors:
        return metrics, {name: tensor.clone() for name, tensor in tensors}


def both_models(policy_parameters, checkpoint):
    """The policy's parameters with the value model's, which only a checkpoint has."""
    values = load_file(checkpoint / "value" / "parameters.safetensors")
    return {f"policy.{name}": tensor for name, tensor in policy_parameters.items()} | {
        f"value.{name}": tensor for name, tensor in values.items()
    }


@pytest.fixture(scope="module")
def whole(group_of, policy, tmp_path_factory):
    """One rank, the whole batch in one packed pass."""
    folder = tmp_path_factory.mktemp("whole")
    metrics, parameters = learn(group_of, policy, num_ranks=1, zero_stage=0, max_tokens=100_000, save=folder)
    return metrics, both_models(parameters, folder)


@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "max_tokens", "batching"),
    [
        (1, 0, 64, "packed"),
        (1, 0, 64, "padded"),
        (2, 0, 100_000, "padded"),
        (2, 1, 64, "packed"),
        (2, 2, 48, "padded"),
        (2, 3, 64, "packed"),
    ],
)
def test_invariance_to_how_the_batch_is_cut(
    group_of, policy, whole, num_ranks, zero_stage, max_tokens, batching, tmp_path
):
    (expected,), parameters = whole
    (metrics,), cut = learn(
        group_of,
        policy,
        num_ranks=num_ranks,
        zero_stage=zero_stage,
        max_tokens=max_tokens,
        batching=batching,
        save=tmp_path,
    )
    padding = metrics.pop("padding_share")
    assert 0.03 < padding <= 0.05 if batching == "padded" else padding == 0
    without_padding = {name: value for name, value in expected.items() if name != "padding_share"}
    assert metrics == pytest.approx(without_padding, rel=2e-4, abs=1e-6)
    cut = both_models(cut, tmp_path)
    assert cut.keys() == parameters.keys()
    for name, tensor in parameters.items():
        torch.testing.assert_close(
            cut[name], tensor, rtol=0, atol=5e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_zero_3_publishes_what_it_was_loaded_with_bit_for_bit(group_of, policy):
    _, published = learn(group_of, policy, num_ranks=2, zero_stage=3, max_tokens=64, num_steps=0)
    plain = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    expected = dict(plain.named_parameters(remove_duplicate=False))
    assert sum(each.numel() for each in plain.parameters()) > 12 * 20_000
    assert published.keys() == expected.keys()
    assert "lm_head.weight" in expected, "tied to the embedding"
    for name, tensor in published.items():
        assert torch.equal(tensor, expected[name]), name


def test_adapters_are_merged_alike_under_zero_3(group_of, policy):
    """Two steps: in the second, both factors of every adapter have gradients."""
    common = {"num_steps": 2, "lora": LoRASettings(rank=4)}
    _, parameters = learn(group_of, policy, num_ranks=1, zero_stage=0, max_tokens=100_000, **common)
    metrics, cut = learn(group_of, policy, num_ranks=2, zero_stage=3, max_tokens=64, **common)
    start = dict(
        AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).named_parameters(
            remove_duplicate=False
        )
    )
    assert cut.keys() == parameters.keys() == start.keys()
    projections = {name for name in start if name.endswith("_proj.weight")}
    assert {name for name in cut if not torch.equal(cut[name], start[name])} == projections
    moved = max((parameters[name] - start[name]).abs().max().item() for name in projections)
    assert moved > 1e-3
    for name, tensor in parameters.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=5e-6)
    sizes = [4 * sum(start[name].shape) for name in projections]
    assert metrics[0]["num_trained_parameters"] == sum(sizes)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_adapters_go_on_from_a_checkpoint_bit_for_bit(group_of, policy, zero_stage, tmp_path):
    common = {"num_ranks": 2, "zero_stage": zero_stage, "max_tokens": 64, "lora": LoRASettings(rank=4)}
    (_, expected), parameters = learn(group_of, policy, num_steps=2, **common)
    learn(group_of, policy, num_steps=1, save=tmp_path, **common)
    (metrics,), resumed = learn(group_of, policy, first_step=1, num_steps=2, load=tmp_path, **common)
    assert metrics == expected
    for name, tensor in parameters.items():
        assert torch.equal(resumed[name], tensor), name


def test_minibatches_are_cut_the_same_on_any_number_of_ranks(group_of, policy):
    algorithm = ALGORITHM.model_copy(update={"num_minibatches": 3})
    (one,), parameters = learn(
        group_of, policy, num_ranks=1, zero_stage=0, max_tokens=64, algorithm=algorithm
    )
    (two,), cut = learn(group_of, policy, num_ranks=2, zero_stage=2, max_tokens=64, algorithm=algorithm)
    assert two["policy_loss"] == pytest.approx(one["policy_loss"], rel=2e-4)
    for name, tensor in parameters.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 2)])
def test_a_gradient_that_is_not_finite_ends_the_run(group_of, policy, num_ranks, zero_stage):
    """The variance of such rewards, which advantages are divided by, is more than float32 holds."""
    with pytest.raises(
        RunError, match=r"^learner step 0: the gradient of the policy model is not finite"
    ) as caught:
        learn(group_of, policy, num_ranks=num_ranks, zero_stage=zero_stage, max_tokens=64, reward_scale=1e30)
    assert not isinstance(caught.value, WorkerError), "which would be started again"


def test_an_independent_ppo_learns_the_same_through_five_steps(group_of, policy, tmp_path):
    num_steps = 5
    metrics, parameters = learn(
        group_of, policy, num_ranks=2, zero_stage=2, max_tokens=64, num_steps=num_steps, save=tmp_path
    )
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
    value = nn.ModuleDict({"backbone": plain.critic, "head": plain.head})
    models = nn.ModuleDict({"policy": plain.policy, "value": value})
    start = {name: tensor.detach().clone() for name, tensor in models.named_parameters()}
    for step in range(num_steps):
        rows = experience(step, plain.policy.config.vocab_size).to_pylist()
        samples = [
            Sample(
                row["prompt_tokens"],
                row["response_tokens"],
                np.flatnonzero(row["response_mask"]).tolist(),
                row["ref_logprobs"],
                row["reward"],
            )
            for row in rows
        ]
        for name, value in plain.step(samples).items():
            assert metrics[step][name] == pytest.approx(value, rel=2e-3, abs=2e-5), (step, name)
    learned = both_models(parameters, tmp_path)
    moved = {"policy": 0.0, "value": 0.0}
    for name, tensor in models.named_parameters():
        torch.testing.assert_close(learned[name], tensor.detach(), rtol=0, atol=2e-5)
        model = name.partition(".")[0]
        moved[model] = max(moved[model], float((tensor.detach() - start[name]).abs().max()))
    assert min(moved.values()) > 1e-3, "there is something to compare"
