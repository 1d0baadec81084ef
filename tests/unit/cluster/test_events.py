"""Deadlines of what is under way, on a clock that the test sets forward. No cluster is started."""

from __future__ import annotations

import pytest

from rlhf_dist.cluster import events as events_module
from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import Events
from rlhf_dist.errors import DeadlineError


class FakeRay:
    """A clock, and calls that are answered at a time of it."""

    ObjectRefGenerator = type("ObjectRefGenerator", (), {})

    def __init__(self):
        self.now, self.answers_at = 100.0, {}
        self.stopped_s = 0.0  # for so long the next wait is stopped

    def monotonic(self):
        return self.now

    def wait(self, refs, *, num_returns, timeout, fetch_local):  # noqa: ARG002
        self.now += timeout + self.stopped_s if timeout else 0.0
        self.stopped_s = 0.0
        ready = [ref for ref in refs if self.answers_at.get(ref, float("inf")) <= self.now]
        return ready[:num_returns], []


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(events_module, "ray", fake)
    monkeypatch.setattr(events_module, "time", fake)
    monkeypatch.setattr(events_module, "wait_for", lambda call, _: call.ref)
    return fake


@pytest.fixture
def events(ray):
    made = Events()
    made.on_turn = lambda: None if ray.now < 10_000 else pytest.fail("it waits without a deadline")
    return made


def expect(events, ref, timeout_s):
    """Have a call awaited; returns what came of it."""
    came = []
    call = Call(ref, "rollout worker 1", "answer a heartbeat")
    events.expect(call, came.append, timeout_s, on_failure=came.append)
    return came


def test_a_call_that_is_not_answered_in_time_is_late(ray, events):
    came = expect(events, "call", timeout_s=30)
    events.wait_until(lambda: bool(came))
    assert isinstance(came[0], DeadlineError)
    assert 130 <= ray.now < 132


def test_what_arrives_just_after_this_process_was_stopped_is_not_late(ray, events):
    came = expect(events, "call", timeout_s=30)
    ray.stopped_s = 3600
    ray.answers_at["call"] = 100 + 3600 + 4
    events.wait_until(lambda: bool(came))
    assert came == ["call"]


def test_no_deadline_runs_while_this_process_is_stopped_and_after_it_each_does(ray, events):
    came = expect(events, "call", timeout_s=30)
    ray.stopped_s = 3600
    events.wait_until(lambda: bool(came))
    assert isinstance(came[0], DeadlineError)
    assert 3728 <= ray.now < 3732, "the seconds of the turn in which it was stopped are forgiven with it"


def test_what_began_after_a_pause_gets_no_more_time(ray, events):
    ray.now += 3600
    came = expect(events, "call", timeout_s=30)
    events.wait_until(lambda: bool(came))
    assert 3730 <= ray.now < 3732


def test_a_slow_turn_is_no_pause(ray, events):
    came = expect(events, "call", timeout_s=30)
    ray.stopped_s = 4
    events.wait_until(lambda: bool(came))
    assert 130 <= ray.now < 132


def test_all_that_has_arrived_is_handled_in_one_turn(ray, events):
    came = [expect(events, name, timeout_s=30) for name in ("first", "second", "third")]
    ray.answers_at |= {"first": 110, "third": 110}
    turns = []
    events.on_turn = lambda: turns.append(ray.now)
    events.wait_until(lambda: bool(came[2]))
    assert came == [["first"], [], ["third"]]
    assert max(turns) < 110, "no further turn for the second of them"


def test_what_an_earlier_answer_makes_needless_is_not_handled(ray, events):
    came = []
    ray.answers_at |= {"a loss": 105, "an answer of the lost worker": 105}
    events.expect(Call("a loss", "driver", "notice"), lambda _: events.forget("lost worker"), 30)
    events.expect(Call("an answer of the lost worker", "lost worker", "generate"), came.append, 30)
    pending = expect(events, "pending", timeout_s=10)
    events.wait_until(lambda: bool(pending))
    assert came == []
