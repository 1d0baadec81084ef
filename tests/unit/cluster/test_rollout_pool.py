"""Weights on their way to the rollout workers, and whose fault it is when they do not arrive. No cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pyarrow as pa
import pytest

from rlhf_dist.cluster import rollout_pool
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import RolloutSettings, SamplingSettings
from rlhf_dist.errors import DataLostError, DeadlineError, WeightsError, WorkerLostError
from rlhf_dist.types import AttemptId, PromptAttempt, RolloutReport

PROMPTS = pa.table({"max_response_tokens": pa.array([None, 5, 500], pa.int32())})


class FakeWorkers:
    """Two workers; a call to one is its index and arguments."""

    def __init__(self, *_, **__):
        self.failures = []

    def __len__(self):
        return 2

    def call(self, index, _method, _published, payload, *, action):
        assert action == "load policy version 3"
        return (index, payload)

    def on_failure(self, index, error):
        self.failures.append((index, error))

    def expect(self, *_, **__):
        pass

    def dismiss(self, *_):
        pass

    def name(self, index):
        return f"rollout worker {index}"


class FakeEvents(dict):
    """Calls under way, with what is to be called with their results."""

    def expect(self, call, then, _timeout_s, *, on_failure):
        self[call] = (then, on_failure)


@pytest.fixture
def events():
    return FakeEvents()


@pytest.fixture
def load(monkeypatch, events):
    """Have the pool's workers load a snapshot; returns what is wanted, which the test may change."""
    monkeypatch.setattr(rollout_pool, "Workers", FakeWorkers)
    monkeypatch.setattr(rollout_pool.ray, "put", lambda _: "prompts")
    monkeypatch.setattr(rollout_pool, "copy_to_object_store", lambda _: "copy")
    pool = RolloutPool(RolloutSettings(), None, ClusterSettings(), PROMPTS)
    published = SimpleNamespace(manifest=SimpleNamespace(version=3))

    def do():
        wanted = [True]
        pool.load_weights(events, published, lambda _: None, is_wanted=lambda: wanted[0])
        return wanted

    do.pool = pool
    return do


GONE = [WeightsError("the learner that wrote it has ended"), DataLostError("its bytes are gone")]
LOST = [WorkerLostError("it died"), DeadlineError("it is late")]


@pytest.mark.parametrize("error", GONE + LOST, ids=lambda error: type(error).__name__)
def test_every_failure_to_load_what_is_wanted_counts(load, events, error):
    load()
    events[1, None][1](error)
    assert load.pool.workers.failures == [(1, error)]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_what_nobody_wants_any_more_need_not_be_there(load, events, error):
    load()[:] = [False]
    events[1, None][1](error)
    assert load.pool.workers.failures == []


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_worker_that_is_lost_is_replaced_whatever_it_was_loading(load, events, error):
    load()[:] = [False]
    events[1, None][1](error)
    assert load.pool.workers.failures == [(1, error)]


def test_who_cannot_map_the_memory_gets_a_copy_at_once_until_there_is_another_learner(load, events):
    load()
    events.pop((1, None))[0](None)
    assert set(events) == {(0, None), (1, "copy")}
    events.clear()
    load()
    assert set(events) == {(0, None), (1, "copy")}
    events.clear()
    load.pool.unpublish()
    load()
    assert set(events) == {(0, None), (1, None)}


@pytest.mark.usefixtures("load")
def test_a_load_is_the_tokens_that_may_still_come(monkeypatch):
    """The run's limit is 8 tokens; the second row of the data set has a lower one of its own."""
    settings = RolloutSettings(samples_per_prompt=2, sampling=SamplingSettings(max_tokens=8))
    pool = RolloutPool(settings, None, ClusterSettings(), PROMPTS)
    first, second, third = (PromptAttempt(ordinal, 0, (0, 1)) for ordinal in (7, 8, 9))
    pool.generate(None, 0, [(first, 0), (second, 1)], 1.0)
    pool.generate(None, 1, [(third, 2)], 1.0)
    assert [load.num_tokens for load in pool.loads([0, 1])] == [2 * 8 + 2 * 5, 2 * 8]
    report = RolloutReport((AttemptId(8, 0), AttemptId(7, 0)), 0, 0.1)
    monkeypatch.setattr(rollout_pool, "wait_for", lambda *_: report)
    pool._on_item(0, ["batch"], lambda *_: None, "report")
    assert [load.num_tokens for load in pool.loads([0, 1])] == [8 + 5, 2 * 8]
    pool.dismiss(None, 0)
    assert [load.num_tokens for load in pool.loads([0, 1])] == [0, 2 * 8]
    assert pool._longest == [{}, {9: 8}]
