"""Batches that lose their scoring worker. No cluster is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_dist.cluster import scoring_pool
from rlhf_dist.cluster.scoring_pool import ScoringHandlers, ScoringPool
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import ScoringSettings
from rlhf_dist.errors import WorkerLostError
from rlhf_dist.types import AttemptId, RolloutReport

DIED = WorkerLostError("it died while it was to score")


class FakeScore:
    """The actor's method; a call is its arguments, and never done."""

    def options(self, **_):
        return self

    def remote(self, rollouts, _temperature, rows):
        return None, (rollouts, rows)


class FakeWorkers:
    """Two workers that start at once."""

    def __init__(self, *_, **__):
        self.actors = [SimpleNamespace(score=FakeScore())] * 2

    def __len__(self):
        return 2

    def expect(self, *_, then, **__):
        then(None)

    def as_call(self, ref, *_):
        return ref

    def dismiss(self, *_):
        pass


@pytest.fixture
def given_up():
    return []


@pytest.fixture
def pool(monkeypatch, given_up):
    monkeypatch.setattr(scoring_pool, "Workers", FakeWorkers)
    arguments = {"reference_model": None, "policy_model": "m", "journal": None, "segment_bytes": 1}
    made = ScoringPool(ScoringSettings(max_attempts=3), None, ClusterSettings(), [], **arguments)
    made.handle(ScoringHandlers(None, lambda *what: given_up.append(what), None))
    return made


@pytest.fixture
def events():
    return SimpleNamespace(expect=lambda *_, **__: None)


def start(pool, events, index):
    pool.start(events, index, lambda: None)


def test_a_worker_is_busy_from_its_first_batch_until_it_is_dismissed(pool, events):
    start(pool, events, 0)
    assert not pool.is_busy(0)
    pool.score(events, "batch", RolloutReport((AttemptId(5, 0), AttemptId(6, 0)), 0, 0.1), 1.0)
    assert pool.is_busy(0)
    assert pool.dismiss(events, 0, DIED) == 1
    assert not pool.is_busy(0)
    start(pool, events, 0)
    assert pool.is_busy(0), "with the batch that waited for a worker"


def test_a_sample_that_takes_every_worker_with_it_is_given_up(pool, events, given_up):
    start(pool, events, 0)
    pool.score(events, "batch", RolloutReport((AttemptId(5, 0),), 0, 0.1), 1.0)
    for _ in range(3):
        assert pool.is_busy(0)
        pool.dismiss(events, 0, DIED)
        start(pool, events, 0)
    assert given_up == [(5, (str(DIED),) * 3)]
    assert not pool.is_busy(0)
