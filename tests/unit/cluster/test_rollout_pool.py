"""Weights on their way to the rollout workers, and whose fault it is when they do not arrive. No cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_dist.cluster import rollout_pool
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import RolloutSettings
from rlhf_dist.errors import DataLostError, DeadlineError, WeightsError, WorkerLostError


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
    pool = RolloutPool(RolloutSettings(), None, ClusterSettings(), None)
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
