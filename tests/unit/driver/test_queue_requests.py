"""Calls to the queue: in order, none before it has started, and again where its actor died."""

from __future__ import annotations

import pytest

from rlhf_dist.driver.queue_requests import QueueRequests
from rlhf_dist.errors import DeadlineError, WorkerLostError


class FakeEvents:
    """Calls under way, by what they ask; the test answers them."""

    def __init__(self):
        self.under_way = {}

    def expect(self, call, then, timeout_s, *, on_failure):
        assert timeout_s == 1
        self.under_way[call] = (then, on_failure)

    def forget(self, _worker):
        self.under_way.clear()


@pytest.fixture
def events():
    return FakeEvents()


@pytest.fixture
def queue(events):
    return QueueRequests(events)


def ask(queue, question, answers):
    queue.ask(lambda: question, answers.append, timeout_s=1)


def test_nothing_is_asked_before_the_actor_has_started(queue, events):
    ask(queue, "first", [])
    ask(queue, "second", [])
    assert events.under_way == {}
    queue.release()
    assert list(events.under_way) == ["first", "second"]


def test_what_a_dead_actor_had_not_answered_is_asked_again_after_what_the_new_one_has_to_know(queue, events):
    answers, lost = [], []
    queue.release()
    queue.on_lost = lost.append
    ask(queue, "answered", answers)
    events.under_way.pop("answered")[0]("yes")
    ask(queue, "open", answers)
    error = WorkerLostError("it died")
    events.under_way.pop("open")[1](error)
    assert (answers, lost) == (["yes"], [error])
    queue.hold()
    ask(queue, "later", answers)
    assert events.under_way == {}
    queue.release(before=lambda: ask(queue, "what is under way", []))
    assert list(events.under_way) == ["what is under way", "open", "later"]


def test_what_the_actor_answers_too_late_is_no_death(queue, events):
    queue.release()
    ask(queue, "question", [])
    with pytest.raises(DeadlineError):
        events.under_way["question"][1](DeadlineError("late"))
