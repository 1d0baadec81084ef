"""The stopwatch, on a clock that only moves when told to."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from rlhf_dist.observability import stopwatch as module
from rlhf_dist.observability.stopwatch import Stopwatch


@pytest.fixture
def passes(monkeypatch):
    """Call it with seconds to let them pass."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def forward(seconds):
        now[0] += seconds

    return forward


def test_the_clock_is_monotonic_time():
    assert module.time.monotonic is time.monotonic


def test_a_phase_counts_its_own_seconds(passes):
    stopwatch = Stopwatch()
    with stopwatch.phase("learning"):
        passes(2.0)
    assert stopwatch.take() == {"learning": 2.0}


def test_time_outside_of_every_phase_is_nobodys(passes):
    stopwatch = Stopwatch()
    passes(5.0)
    with stopwatch.phase("a"):
        passes(1.0)
    passes(7.0)
    with stopwatch.phase("b"):
        passes(2.0)
    passes(9.0)
    assert stopwatch.take() == {"a": 1.0, "b": 2.0}


def test_a_nested_phase_counts_once_for_the_inner_one(passes):
    stopwatch = Stopwatch()
    with stopwatch.phase("outer"):
        passes(1.0)
        with stopwatch.phase("inner"):
            passes(10.0)
            with stopwatch.phase("innermost"):
                passes(100.0)
            passes(20.0)
        passes(2.0)
    seconds = stopwatch.take()
    assert seconds == {"outer": 3.0, "inner": 30.0, "innermost": 100.0}
    assert sum(seconds.values()) == 133.0


def test_the_same_phase_adds_up_also_inside_itself(passes):
    stopwatch = Stopwatch()
    for _ in range(3):
        with stopwatch.phase("a"):
            passes(1.0)
            with stopwatch.phase("a"):
                passes(2.0)
    assert stopwatch.take() == {"a": 9.0}


def test_taking_starts_from_zero(passes):
    stopwatch = Stopwatch()
    with stopwatch.phase("a"):
        passes(1.0)
    assert stopwatch.take() == {"a": 1.0}
    assert stopwatch.take() == {}


def test_taking_inside_a_phase_counts_what_has_passed_and_the_rest_later(passes):
    stopwatch = Stopwatch()
    with stopwatch.phase("a"):
        passes(1.0)
        assert stopwatch.take() == {"a": 1.0}
        passes(4.0)
    assert stopwatch.take() == {"a": 4.0}


def test_a_phase_that_raises_is_counted_and_closed(passes):
    stopwatch = Stopwatch()

    def fail():
        passes(1.0)
        raise KeyError

    with pytest.raises(KeyError), stopwatch.phase("a"):
        fail()
    passes(5.0)
    assert stopwatch.take() == {"a": 1.0}


def test_whoever_watches_hears_of_each_change_and_of_the_return_to_the_outer_phase(passes):
    heard = []
    stopwatch = Stopwatch(heard.append)
    with stopwatch.phase("outer"):
        with stopwatch.phase("inner"):
            passes(1.0)
        with stopwatch.phase("other"):
            pass
    assert heard == ["outer", "inner", "outer", "other", "outer"]
