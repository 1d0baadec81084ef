"""What only a GPU shows. One is enough: the roles share it, as they do on a machine with one.

With NCCL_MULTI_RANK_GPU_ENABLE=1 and an NCCL that knows it (2.30, put before torch's by LD_PRELOAD and named
in VLLM_NCCL_SO_PATH), sending over NCCL is tested on one GPU as well.
"""

from __future__ import annotations

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from kills import Kill
from strikes import disturb
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from rlhf_dist.engines.packing import IMPLEMENTATION
from rlhf_dist.experience.journal import JOURNAL_FOLDER
from rlhf_dist.experience.steps import read_history
from rlhf_dist.types import Probe, PublishedWeights
from rlhf_dist.weights.certificate import TOLERANCE_NATS
from rlhf_dist.weights.device_digest import hex_digests, word_sums
from rlhf_dist.weights.device_memory import DevicePublisher, DeviceReceiver
from rlhf_dist.weights.snapshot import snapshot_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_STEPS = 6
SHARED = (
    f"run.num_steps={NUM_STEPS}",
    "run.num_sample_answers=1",
    "rollout.num_workers=1",
    "rollout.gpus_per_worker=0.3",
    "rollout.gpu_memory_utilization=0.1",
    "rollout.enforce_eager=true",
    "rollout.prompts_per_step=16",
    "rollout.samples_per_batch=8",
    "scoring.gpus_per_worker=0.2",
    "learner.num_workers=1",
    "learner.gpus_per_worker=0.3",
    "checkpoint.every_steps=2",
    "recovery.heartbeat_timeout_s=20",
    "recovery.max_restarts=1",
)
can_share_nccl = pytest.mark.skipif(
    os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1" and torch.cuda.device_count() < 2,
    reason="NCCL takes one rank a GPU; see the module's docstring",
)


def _receive(published, connection):
    with DeviceReceiver().receive(published) as tensors:
        connection.send({name: tensor.float().sum().item() for name, tensor in tensors})


def test_another_process_maps_what_was_published_and_reads_the_same():
    tensors = [
        (("a", "tied"), torch.randn(300, 70, device="cuda")),
        (("b",), torch.randn(5000, device="cuda").bfloat16()),
    ]
    publisher = DevicePublisher(snapshot_bytes(each.nbytes for _, each in tensors), torch.device("cuda"))
    context = multiprocessing.get_context("spawn")
    for version in range(3):
        manifest, address = publisher.publish(version, [tensors], Probe((1, 2), (-1.0,)))
        ours, theirs = context.Pipe()
        reader = context.Process(
            target=_receive, args=(PublishedWeights(manifest, address, "", 0, 0), theirs)
        )
        reader.start()
        assert ours.poll(60), "nothing was read within 60 s"
        assert ours.recv() == {
            name: tensor.float().sum().item() for names, tensor in tensors for name in names
        }
        reader.join(60)
        assert reader.exitcode == 0
        tensors[0][1].add_(1)


@pytest.mark.parametrize("num_elements", [0, 1, 1001 * 33, 5_000_000])
def test_a_digest_is_the_same_on_both_devices(num_elements):
    tensor = torch.randn(num_elements).bfloat16()
    assert hex_digests([word_sums(tensor)]) == hex_digests([word_sums(tensor.cuda())])


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_one_kernel_attends_as_each_sequence_does_by_itself(sliding_window):
    lengths, heads = (7, 12, 1, 20), 4
    parts = torch.randn(3, 1, heads, sum(lengths), 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weights = torch.randn(1, sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16)

    def attend():
        module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
        options = {"sequence_lengths": lengths, "sliding_window": sliding_window, "scaling": 0.1}
        output, _ = AttentionInterface()[IMPLEMENTATION](module, *parts, None, **options)
        (gradient,) = torch.autograd.grad((output * weights).sum(), parts)
        return output, gradient

    with sdpa_kernel(SDPBackend.MATH):
        alone = attend()
    for one, other in zip(attend(), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("transport", "victim"),
    [
        ("auto", Kill("learner", "SIGKILL", 0, 3, during_recovery=False, method=None, delay_s=0.1)),
        pytest.param(
            "nccl",
            Kill("rollout", "SIGKILL", 0, 3, during_recovery=False, method=None, delay_s=0.1),
            marks=can_share_nccl,
        ),
    ],
)
def test_the_whole_job_on_one_gpu_survives_a_kill(start, transport, victim):
    run = disturb(start, (*SHARED, f"weights.transport={transport}"), [victim])
    assert run.returncode == 0, run.output
    assert [step["step"] for step in run.metrics] == list(range(NUM_STEPS))
    assert max(step["probe_difference_max"] for step in run.metrics) <= TOLERANCE_NATS["bfloat16"]
    assert sum(step["num_repeated_loads"] for step in run.metrics) == 0
    assert [event["event"] for event in run.events] == ["lost", "recovered"]
    assert max(step["learner_gpu_gib_max"] for step in run.metrics) > 0
    served = {record["version"] for record in read_history(run.folder / JOURNAL_FOLDER).served}
    assert served == set(range(NUM_STEPS + 1))
