"""The experience queue without its actor: what it does with its journal and its leases."""

from __future__ import annotations

import asyncio
import threading
import time

import pyarrow as pa
import pytest

from rlhf_dist.cluster import experience_queue as module
from rlhf_dist.cluster.experience_queue import ExperienceQueue
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.experience.compaction import Compaction
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.experience.steps import read_history
from rlhf_dist.types import BatchInfo, BatchPlace, SampleInfo


@pytest.fixture
def make(tmp_path):
    """Queues of two prompts a step, one sample each."""

    async def make(**settings):
        queue = ExperienceQueue(
            ExperienceSettings(**settings),
            tmp_path,
            first_step=0,
            num_steps=10,
            prompts_per_step=2,
            samples_per_prompt=1,
            in_order=True,
            prompts=pa.table({"prompt": ["p"], "columns": ["{}"]}),
            order=PromptOrder(1, seed=0, shuffle=False),
        )
        await queue.start()
        return queue

    return make


def test_one_compaction_comes_after_the_other(make, monkeypatch):
    seen, under_way = [], threading.Lock()
    samples = tuple(SampleInfo(ordinal, 0, 0, 0, 0, 10) for ordinal in (0, 1))

    def compact(_, done, **__):
        assert under_way.acquire(blocking=False), "another one is under way"
        time.sleep(0.05)
        seen.append([ordinal for ordinal in range(4) if ordinal in done])
        under_way.release()
        return Compaction([], [], None if len(seen) == 1 else "the disk is full")

    async def check():
        queue = await make()
        await queue.put(["batch"], BatchInfo(samples, 100, BatchPlace("segment-000001", 0)))
        await queue.acknowledge(await queue.lease(0), "digest")
        return await asyncio.gather(queue.checkpointed(0), queue.checkpointed(1))

    monkeypatch.setattr(module, "compact", compact)
    assert asyncio.run(check()) == [None, "the disk is full"]
    assert seen == [[], [0, 1]], "the prompts of the steps that a checkpoint holds"


def test_a_step_whose_lease_expired_counts_once_with_the_samples_that_it_had(make, tmp_path):
    """As where the learner was lost, and repeated steps for longer than a lease is out."""
    place = BatchPlace("segment-000001", 0)
    samples = tuple(SampleInfo(ordinal, 0, 0, 0, 0, 10) for ordinal in (0, 1))

    async def check():
        queue = await make(lease_timeout_s=0.01)
        await queue.put(["batch"], BatchInfo(samples, 100, place))
        lease = await queue.lease(0)
        time.sleep(0.02)  # the queue has nothing else to do
        assert await queue.acknowledge(lease, "digest") == 0
        return queue

    queue = asyncio.run(check())
    (step,) = read_history(tmp_path).steps.values()
    assert (step.trained, step.policy_digest) == (True, "digest")
    assert [rows.place for rows in step.samples] == [place]
    assert queue._ledger.counts().trained == 2
    assert queue._held == {}
