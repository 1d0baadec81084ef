"""Overlap and CPU shares, from numbers."""

from __future__ import annotations

import pytest

from rlhf_dist.bench.overlap import CpuTime, cpu_time, timing
from rlhf_dist.bench.processes import Usage

NO_CPU = CpuTime(0.0, 0.0, 1.0)


def step(since_start, *, waiting, learning, weights, rollout, scoring=0.25):
    return {
        "seconds_since_start": since_start,
        "seconds_waiting": waiting,
        "seconds_learning": learning,
        "seconds_weights": weights,
        "seconds_rollout": rollout,
        "seconds_scoring": scoring,
    }


def test_a_step_is_the_mean_of_those_after_the_warm_up():
    steps = [
        step(20.0, waiting=9.0, learning=9.0, weights=2.0, rollout=9.0),
        step(24.0, waiting=1.0, learning=2.0, weights=0.5, rollout=3.0),
        step(30.0, waiting=3.0, learning=2.0, weights=0.5, rollout=5.0),
    ]
    found = timing(steps, NO_CPU, num_warmup=1)
    assert found.num_steps == 2
    assert found.wall_s == 5.0
    assert found.phases_s == {
        "waiting": 2.0,
        "learning": 2.0,
        "weights": 0.5,
        "rollout": 4.0,
        "scoring": 0.25,
    }
    assert found.bubble == 0.4
    assert found.larger_s == 4.0, "generation"
    assert found.hidden == 0.8


def test_weights_hold_the_learner_up():
    steps = [step(now, waiting=0.0, learning=3.0, weights=1.0, rollout=3.5) for now in (4.0, 8.0)]
    found = timing(steps, NO_CPU, num_warmup=1)
    assert found.larger_s == 4.0
    assert found.hidden == 1.0


def test_cpu_time_is_what_came_in_between():
    def usage(name, cpu_s):
        return Usage(name, cpu_s, rss_bytes=0)

    before = {1: usage("python train", 10.0), 2: usage("ray::ExperienceQueue", 1.0), 3: usage("gone", 7.0)}
    after = {
        1: usage("python train", 12.0),
        2: usage("ray::ExperienceQueue.put", 2.0),
        4: usage("ray::RolloutWorker", 17.0),
    }
    found = cpu_time(before, after, driver=1)
    assert found == CpuTime(driver_s=2.0, queue_s=1.0, all_s=20.0)
    assert (found.driver_share, found.queue_share) == pytest.approx((0.1, 0.05))
