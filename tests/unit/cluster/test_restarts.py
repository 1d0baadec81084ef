"""How often a worker may be started again, and after how long."""

from __future__ import annotations

import pytest

from rlhf_dist.cluster.restarts import RestartBudget
from rlhf_dist.config import RecoverySettings
from rlhf_dist.errors import WorkerError, WorkerLostError

LOST = WorkerLostError("rollout worker 1 died while it was to generate")


def budget(**settings):
    return RestartBudget(RecoverySettings(**settings), "rollout worker 1")


def test_the_first_restart_is_at_once_and_each_further_one_waits_twice_as_long_up_to_a_minute():
    restarts = budget(backoff_s=4, max_restarts=8)
    delays = [restarts.spend("rollout worker 1", LOST, now=now) for now in range(8)]
    assert delays == [0, 4, 8, 16, 32, 60, 60, 60]


def test_one_too_many_names_the_culprit_the_limit_and_the_last_error():
    restarts = budget(max_restarts=2, window_s=600)
    restarts.spend("rollout worker 1", LOST, now=0)
    restarts.spend("rollout worker 1", LOST, now=1)
    with pytest.raises(WorkerError) as error:
        restarts.spend("rollout worker 1", LOST, now=2)
    text = str(error.value)
    assert text.startswith("rollout worker 1 was lost, and it has been started again")
    assert "2 times within 600 s (recovery.max_restarts=2)" in text
    assert text.endswith(f"The last error: {LOST}")
    assert error.value.exit_code == 9


def test_restarts_before_the_window_count_no_more():
    restarts = budget(max_restarts=1, window_s=10)
    for now in (0, 10, 20):
        assert restarts.spend("rollout worker 1", LOST, now=now) == 0
        restarts.progressed()
    with pytest.raises(WorkerError):
        restarts.spend("rollout worker 1", LOST, now=29.9)


def test_with_a_limit_of_0_the_first_loss_ends_the_run():
    with pytest.raises(WorkerError, match=r"recovery\.max_restarts=0"):
        budget(max_restarts=0).spend("rollout worker 1", LOST, now=0)


def test_ranks_are_named_one_by_one_and_counted_together():
    restarts = RestartBudget(RecoverySettings(max_restarts=1), "learner")
    restarts.spend("learner worker 0", LOST, now=0)
    with pytest.raises(WorkerError, match=r"^learner worker 1 was lost, and the learner has been started"):
        restarts.spend("learner worker 1", LOST, now=1)


def test_a_crash_loop_that_is_slower_than_the_window_ends_as_well():
    restarts = budget(max_restarts=3, window_s=10)
    for now in (0, 100, 200):
        assert restarts.spend("rollout worker 1", LOST, now=now) == 0
    times = r"started again 3 times without a learner step done meanwhile \(recovery\.max_restarts=3\)"
    with pytest.raises(WorkerError, match=times):
        restarts.spend("rollout worker 1", LOST, now=300)


def test_what_was_lost_before_the_run_made_progress_is_no_crash_loop():
    restarts = budget(max_restarts=1, window_s=10)
    for now in (0, 100, 200):
        assert restarts.spend("rollout worker 1", LOST, now=now) == 0
        restarts.progressed()
