"""What is done when something is lost: by whom it is replaced, how long that may take, when the run ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_dist.cluster import restarts
from rlhf_dist.driver import recovery
from rlhf_dist.driver.recovery import Recovery
from rlhf_dist.errors import (
    DataLostError,
    DeadlineError,
    LearnerLostError,
    ResourceError,
    RewardTimeoutError,
    WeightsError,
    WorkerError,
    WorkerLostError,
)

DIED = WorkerLostError("it died while it was to work")


class FakeEvents:
    """Timers on a clock that the test sets forward."""

    def __init__(self):
        self.now = 1000.0
        self.timers = []

    def monotonic(self):
        return self.now

    def wait_until(self, reached):
        """Let time pass until then, but no more than a day."""
        for _ in range(86_400):
            if reached():
                return
            self.pass_by(1)
        raise AssertionError("it waits without a deadline")

    def after(self, seconds, then):
        self.timers.append((self.now + seconds, then))

    def pass_by(self, seconds):
        """Let time pass, and call what is due meanwhile."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= end]:
            timer = min(due, key=lambda each: each[0])
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1]()
        self.now = end


class FakeWorkers:
    """Says what was done with the workers of a role."""

    def __init__(self, role, count):
        self.role, self.lives = role, [0] * count  # how often each was replaced
        self.without_room = set()
        self.replaced, self.asked = [], []
        self.on_failure = None

    def __len__(self):
        return len(self.lives)

    def name(self, index):
        return f"{self.role} worker {index}"

    def life(self, index):
        return self.lives[index]

    def has_room(self, index):
        return index not in self.without_room

    def replace(self, index):
        self.replaced.append(index)

    def expect(self, _events, index, method, *, then, **_):
        self.asked.append((index, method, then))

    def watch(self, heartbeats, index):
        pass


class FakePool:
    """Workers that have started when they are told to."""

    def __init__(self, role, count):
        self.workers = FakeWorkers(role, count)
        self.ready, self.busy = set(range(count)), set()

    def __len__(self):
        return len(self.workers)

    def start(self, _events, index, on_started):
        self.ready.add(index)
        on_started()

    def dismiss(self, _events, index, _error=None):
        self.workers.lives[index] += 1
        self.ready.discard(index)
        return 0

    def has_workers(self):
        return bool(self.ready)

    def is_busy(self, index):
        return index in self.busy

    def is_ready(self):
        return len(self.ready) == len(self)


class FakeLog:
    """Counts what is written."""

    def __init__(self):
        self.step, self.num_lost, self.num_recovered = 0, 0, 0

    def lost(self, *_):
        self.num_lost += 1

    def recovered(self, *_, **__):
        self.num_recovered += 1


class System:
    """A run's roles without processes."""

    def __init__(self, config, num_workers):
        self.events, self.log = FakeEvents(), FakeLog()
        self.rollout, self.scoring = FakePool("rollout", num_workers), FakePool("scoring", num_workers)
        self.learner = SimpleNamespace(workers=FakeWorkers("learner", 2))
        flow = SimpleNamespace(
            events=self.events,
            queue=SimpleNamespace(ask=lambda *_, **__: None, release=None),
            leave=lambda _: set(),
            join=lambda _, on_served: on_served(),
            has_workers=self.rollout.has_workers,
            is_ready=self.rollout.is_ready,
        )
        queue = SimpleNamespace(lost=lambda _: None)
        roles = SimpleNamespace(rollout=self.rollout, scoring=self.scoring, learner=self.learner, queue=queue)
        self.recovery = Recovery(config, None, None, roles, flow, self.log)

    def lose(self, pool, index, error=DIED):
        pool.workers.on_failure(index, error)


@pytest.fixture
def system(config, monkeypatch):
    """Make such roles, with settings of the section `recovery`."""

    def make(num_workers=2, **settings):
        made = System(config(recovery=settings), num_workers)
        monkeypatch.setattr(recovery, "time", made.events)
        monkeypatch.setattr(restarts, "time", made.events)
        return made

    return make


# ----------------------------------------------------------------------------------------- restart budgets


def test_a_node_that_is_lost_with_many_workers_is_one_restart_of_each_and_all_start_again_at_once(system):
    made = system(num_workers=8, max_restarts=2)
    for index in range(8):
        made.lose(made.rollout, index)
    made.events.pass_by(0)
    assert made.rollout.workers.replaced == list(range(8))
    assert (made.log.num_lost, made.log.num_recovered) == (8, 8)


def test_a_worker_that_is_lost_again_and_again_ends_the_run(system):
    made = system(max_restarts=2)
    for _ in range(2):
        made.lose(made.scoring, 1)
        made.events.pass_by(10)
    made.lose(made.scoring, 0)
    with pytest.raises(
        WorkerError, match=r"^scoring worker 1 was lost, and it has been started again 2 times"
    ):
        made.lose(made.scoring, 1)


def test_a_scoring_worker_that_is_lost_over_a_batch_spends_nothing_and_starts_again_at_once(system):
    made = system(max_restarts=1)
    for error in (DIED, DeadlineError("no heartbeat"), RewardTimeoutError("a reward hung")):
        made.scoring.busy = {1}
        made.lose(made.scoring, 1, error)
        made.events.pass_by(0)
    assert made.scoring.workers.replaced == [1, 1, 1]
    made.scoring.busy = set()
    made.lose(made.scoring, 1)
    with pytest.raises(WorkerError, match="started again 1 times"):
        made.lose(made.scoring, 1)


def test_losses_count_until_the_run_has_done_another_step_and_repeating_one_is_no_progress(system):
    made = system(max_restarts=2, window_s=1)
    for step in (1, 2):
        made.recovery.step = step
        for _ in range(2):
            made.lose(made.rollout, 0)
            made.events.pass_by(60)
    made.recovery.step = 2
    with pytest.raises(WorkerError, match="2 times without a learner step done meanwhile"):
        made.lose(made.rollout, 0)


# ------------------------------------------------------------------------------------------------ the start


@pytest.fixture
def start(monkeypatch):
    """Have a run start, of which something is lost meanwhile."""

    def do(made, meanwhile):
        monkeypatch.setattr(Recovery, "_start_queue", lambda *_: None)
        monkeypatch.setattr(Recovery, "_start_learner", lambda *_, **__: meanwhile())
        made.recovery.start(0)

    return do


@pytest.mark.parametrize("role", ["rollout", "scoring"])
def test_an_exception_before_the_run_has_begun_ends_it_at_once(system, start, role):
    made = system()
    broken = WorkerError(f"{role} worker 0 failed to start: ModuleNotFoundError: No module named 'flash'")
    with pytest.raises(WorkerError, match="No module named 'flash'"):
        start(made, lambda: made.lose(getattr(made, role), 0, broken))
    assert getattr(made, role).workers.replaced == []


def test_a_process_that_dies_before_the_run_has_begun_is_replaced(system, start):
    made = system()
    start(made, lambda: made.lose(made.rollout, 1))
    made.events.pass_by(0)
    assert made.rollout.workers.replaced == [1]


def test_while_a_run_starts_the_place_of_a_worker_has_a_deadline_even_if_others_are_left(system, start):
    made = system()
    made.rollout.workers.without_room = {1}
    with pytest.raises(ResourceError) as error:
        start(made, lambda: made.lose(made.rollout, 1))
    assert str(error.value).startswith(
        "rollout worker 1 is gone with its node, and the cluster found no place"
    )
    assert "60 s (cluster.placement_timeout_s); a run starts with all of its workers" in str(error.value)
    assert 1060 < made.events.now < 1065


def test_when_a_run_has_started_the_others_go_on_for_as_long_as_it_takes(system, start):
    made = system()
    start(made, lambda: None)
    made.rollout.workers.without_room = {1}
    made.lose(made.rollout, 1)
    made.events.pass_by(10_000)
    made.rollout.workers.without_room = set()
    made.events.pass_by(2)
    assert made.rollout.workers.replaced == [1]


def test_a_worker_that_has_its_place_is_replaced_while_another_one_has_none(system, start):
    made = system()
    start(made, lambda: None)
    made.rollout.workers.without_room = {1}
    made.lose(made.rollout, 1)
    made.events.pass_by(10_000)
    made.lose(made.rollout, 0)
    made.events.pass_by(0)
    assert made.rollout.workers.replaced == [0]


def test_where_no_other_is_left_their_place_has_a_deadline(system, start):
    made = system()
    start(made, lambda: None)
    made.rollout.workers.without_room = {0, 1}
    made.lose(made.rollout, 0)
    made.events.pass_by(10_000)
    made.lose(made.rollout, 1)
    with pytest.raises(
        ResourceError, match=r"60 s \(cluster\.placement_timeout_s\); its role has no other left"
    ):
        made.events.pass_by(100)


# --------------------------------------------------------------------------- weights that cannot be loaded

UNREADABLE = [WeightsError("the snapshot is gone"), DataLostError("its bytes are gone")]


def ask(made, error):
    """Have a worker fail with weights, and return what becomes of the learner's answer."""
    made.lose(made.rollout, 1, error)
    assert made.log.num_lost == 0
    ((rank, method, it_lives),) = made.learner.workers.asked
    assert (rank, method) == (0, "answer_heartbeat")
    return it_lives


@pytest.mark.parametrize("error", UNREADABLE, ids=lambda error: type(error).__name__)
def test_where_the_learner_is_gone_weights_that_cannot_be_loaded_are_its_fault(system, error):
    made = system()
    ask(made, error)
    with pytest.raises(LearnerLostError):
        made.lose(made.learner, 0)
    assert made.log.num_lost == 0


def test_where_the_learner_lives_weights_that_cannot_be_proved_end_the_run(system):
    made = system()
    with pytest.raises(WeightsError):
        ask(made, UNREADABLE[0])(None)


def test_where_the_learner_lives_a_worker_that_lost_the_bytes_is_replaced(system):
    made = system()
    ask(made, UNREADABLE[1])(None)
    made.events.pass_by(0)
    assert made.rollout.workers.replaced == [1]


def test_one_that_was_replaced_before_the_learner_answered_is_not_lost_again(system):
    made = system()
    it_lives = ask(made, UNREADABLE[1])
    made.lose(made.rollout, 1)
    made.events.pass_by(0)
    it_lives(None)
    assert (made.log.num_lost, made.rollout.workers.replaced) == (1, [1])
