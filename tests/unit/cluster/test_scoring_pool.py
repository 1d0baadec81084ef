"""Batches that lose their scoring worker. No cluster is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_dist.cluster import scoring_pool
from rlhf_dist.cluster.calls import late
from rlhf_dist.cluster.scoring_pool import ScoringHandlers, ScoringPool
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import ScoringSettings
from rlhf_dist.errors import WorkerLostError
from rlhf_dist.types import AttemptId, FailedSample, RolloutReport, ScoreReport

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
    made = ScoringPool(ScoringSettings(max_attempts=3, backoff_s=2), None, ClusterSettings(), [], **arguments)
    made.handle(ScoringHandlers(lambda *_: None, lambda *what: given_up.append(what), None))
    return made


class FakeEvents:
    """Keeps the last call's handler; timers are over at once."""

    def __init__(self):
        self.pauses_s = []

    def expect(self, _, then, *__, **___):
        self.then = then

    def after(self, seconds, then):
        self.pauses_s.append(seconds)
        then()


@pytest.fixture
def events():
    return FakeEvents()


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
    assert events.pauses_s == [2, 4], "before its second and its third attempt"


def test_what_a_batch_met_is_not_held_against_each_of_its_samples(pool, events, given_up):
    start(pool, events, 0)
    pool.score(events, "batch", RolloutReport((AttemptId(5, 0), AttemptId(6, 0)), 0, 0.1), 1.0)
    for _ in range(2):
        pool.dismiss(events, 0, DIED)
        start(pool, events, 0)
    assert [job.rows for job in pool._jobs[0]] == [(0,), (1,)], "one by one from now on"
    for num_own_failures in (1, 2, 3):
        assert given_up == []
        failed = FailedSample(row=1, ordinal=6, sample=0, attempt=0, reason=f"raised {num_own_failures}")
        events.then(ScoreReport(None, 0.1, (failed,)))
    assert given_up == [(6, ("raised 1", "raised 2", "raised 3"))]


def test_what_to_do_about_the_end_of_a_run_is_no_part_of_a_reason(pool, events, given_up):
    start(pool, events, 0)
    pool.score(events, "batch", RolloutReport((AttemptId(5, 0),), 0, 0.1), 1.0)
    for _ in range(3):
        pool.dismiss(events, 0, late("scoring worker 0", "answer", 5))
        start(pool, events, 0)
    ((_, reasons),) = given_up
    stuck = "it may be stuck, or too slow for the deadline in the section `cluster`"
    assert reasons == (f"scoring worker 0 did not answer within 5 s; {stuck}",) * 3
