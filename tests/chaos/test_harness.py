"""The chaos suite's own parts: schedules, moments, and what it makes of the events of a run."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import psutil
import pytest
from invariants import Toll
from kills import TITLES, Kill, make_schedule
from outcome import Outcome, outcomes, table
from strikes import Disturbed, Strike, disturb, processes_of, title_of

from rlhf_dist.experience.journal import JOURNAL_FOLDER

IDLE, SAVING = "ray::LearnerWorker", "ray::LearnerWorker.save"
DEADLINE_S = 20


def kill(role, blow="SIGKILL", **changes):
    fields = {"worker": 0, "after_steps": 0, "during_recovery": False, "method": None, "delay_s": 0.0}
    return Kill(role, blow, **fields | changes)


def test_a_seed_gives_the_same_schedule_and_every_role_its_turn():
    schedule = make_schedule(3, num_steps=10, num_kills=12)
    assert schedule == make_schedule(3, num_steps=10, num_kills=12)
    assert schedule != make_schedule(4, num_steps=10, num_kills=12)
    assert {each.role for each in schedule[:6]} == {*TITLES, "driver", "machine"}
    steps = [each.after_steps for each in schedule]
    assert steps == sorted(steps)
    assert steps[-1] < 9, "there is a step left to survive"


# ------------------------------------------------------------------------------------------------ moments


class FakeCommand:
    """Processes with the titles of a driver that ends when there is a file `over`, and of learner ranks, the
    last of which saves when there is a file `saving`."""

    def __init__(self, folder):
        self.folder, self.output = folder, ""
        over = f"while [ ! -e {folder}/over ]; do sleep 0.05; done"
        saves = f"while [ ! -e {folder}/saving ]; do sleep 0.05; done; exec -a {SAVING} sleep 60"
        self.process = subprocess.Popen(["bash", "-c", over])
        self.ranks = [
            subprocess.Popen(["bash", "-c", f"exec -a {IDLE} sleep 60"]),
            subprocess.Popen(["bash", "-c", f"exec -a {IDLE} bash -c '{saves}'"]),
        ]
        wait_until(lambda: [title_of(each.pid) for each in self.ranks] == [IDLE, IDLE])

    def processes(self):
        return [psutil.Process(each.pid) for each in [self.process, *self.ranks] if each.poll() is None]

    def wait(self):
        returncode = self.process.wait(timeout=DEADLINE_S)
        return SimpleNamespace(returncode=returncode, output="", metrics=[])

    def assert_nothing_left(self, deadline_s):
        pass

    def end(self):
        for each in [self.process, *self.ranks]:
            each.kill()
            each.wait()


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def command(tmp_path):
    made = FakeCommand(tmp_path)
    yield made
    made.end()


@pytest.fixture
def disturbing(command):
    """Put the command through a schedule, beside the test."""
    results: list[Disturbed] = []

    def begin(*schedule):
        threading.Thread(
            target=lambda: results.append(disturb(lambda: command, (), schedule)), daemon=True
        ).start()

        def result():
            wait_until(lambda: bool(results))
            return results[0]

        return result

    return begin


def test_processes_are_told_apart_by_their_titles(command):
    assert [each.pid for each in processes_of(command, "learner")] == sorted(
        rank.pid for rank in command.ranks
    )
    assert processes_of(command, "rollout") == []
    assert [each.pid for each in processes_of(command, "driver")] == [command.process.pid]


def test_a_blow_waits_for_its_step_and_its_method(command, disturbing):
    idle, saver = command.ranks
    which = processes_of(command, "learner").index(psutil.Process(saver.pid))
    result = disturbing(kill("learner", worker=which, after_steps=2, method="save"))
    (command.folder / "metrics.jsonl").write_text("{}\n{}\n")
    time.sleep(0.5)  # it would have had the time
    assert saver.poll() is None
    (command.folder / "saving").touch()
    wait_until(lambda: saver.poll() is not None)
    assert idle.poll() is None
    (command.folder / "over").touch()
    (strike,) = result().strikes
    assert (strike.title, strike.num_steps) == (SAVING, 2)


def test_a_blow_during_a_recovery_waits_for_a_loss_that_was_noticed_after_the_last_one(command, disturbing):
    result = disturbing(kill("learner"), kill("learner", during_recovery=True))
    wait_until(lambda: sum(rank.poll() is None for rank in command.ranks) == 1)
    time.sleep(0.5)  # it would have had the time
    assert sum(rank.poll() is None for rank in command.ranks) == 1
    write_events(command.folder, event(time.time(), "lost", "learner"))
    wait_until(lambda: all(rank.poll() is not None for rank in command.ranks))
    (command.folder / "over").touch()
    assert len(result().strikes) == 2


def test_a_moment_that_never_comes_is_reported(command, disturbing):
    result = disturbing(kill("learner", after_steps=2))
    (command.folder / "over").touch()
    assert result().missed == [kill("learner", after_steps=2)]


# ------------------------------------------------------------------------------------------------ outcomes


def event(at, name, role, worker="", **fields):
    return {"time": datetime.fromtimestamp(at, UTC).isoformat(), "event": name, "role": role} | {
        "worker": worker or f"{role} worker 0",
        **fields,
    }


def recovered(at, role, worker="", *, again=0, replayed=0):
    return event(at, "recovered", role, worker, dispatched_again=again, replayed_steps=replayed)


def write_events(folder, *events):
    (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))


def seconds_of(folder, kills_at, *events):
    """(detected, recovered) of each blow."""
    write_events(folder, *events)
    strikes = [Strike(kill(role), at, "", 0, 0) for role, at in kills_at]
    run = Disturbed(folder, 0, "", [], strikes)
    toll = Toll(lost=0, doubled=0, needless=0)
    found = outcomes("run", run, toll, prompts_ahead=16, samples_per_prompt=1)
    return [(each.detected_s, each.recovered_s) for each in found]


def test_each_blow_has_its_own_loss_and_its_own_workers_recovery(tmp_path):
    assert seconds_of(
        tmp_path,
        [("rollout", 100.0), ("rollout", 105.0), ("queue", 106.0)],
        event(101.0, "lost", "rollout", "rollout worker 1"),
        event(107.0, "lost", "rollout", "rollout worker 0"),
        event(108.0, "lost", "queue"),
        recovered(109.0, "queue"),
        recovered(112.0, "rollout", "rollout worker 1"),
        recovered(115.0, "rollout", "rollout worker 0"),
    ) == [(1.0, 12.0), (2.0, 10.0), (2.0, 3.0)]


def test_a_blow_on_a_learner_that_is_being_replaced_counts_with_the_loss_before(tmp_path):
    assert seconds_of(
        tmp_path,
        [("learner", 100.0), ("learner", 101.5), ("learner", 120.0)],
        event(101.0, "lost", "learner", "learner worker 1"),
        recovered(110.0, "learner", "learner worker 1"),
        event(121.0, "lost", "learner", "learner worker 0"),
        recovered(130.0, "learner", "learner worker 0"),
    ) == [(1.0, 10.0), (None, 8.5), (1.0, 10.0)]


def test_a_worker_that_is_lost_again_while_it_is_replaced_comes_back_once_for_each_loss(tmp_path):
    name = "rollout worker 1"
    events = (event(101.0, "lost", "rollout", name), event(107.0, "lost", "rollout", name))
    back = [recovered(112.0, "rollout", name, again=5), recovered(112.1, "rollout", name, again=0)]
    write_events(tmp_path, *events, *back)
    strikes = [Strike(kill("rollout", worker=1), at, "", 0, 0) for at in (100.0, 105.0)]
    run = Disturbed(tmp_path, 0, "", [], strikes)
    found = outcomes("run", run, Toll(lost=0, doubled=0, needless=0), prompts_ahead=16, samples_per_prompt=2)
    assert [each.generated_again for each in found] == [10, 0]
    assert [each.recovered_s for each in found] == pytest.approx([12.0, 7.1])


def test_a_driver_that_was_killed_notices_no_more(tmp_path):
    (tmp_path / JOURNAL_FOLDER).mkdir()
    (blow, _) = seconds_of(
        tmp_path,
        [("learner", 100.0), ("machine", 100.5)],
        event(130.0, "lost", "learner"),
        recovered(140.0, "learner"),
    )
    assert blow == (None, 40.0)


def test_what_never_came_back_has_no_time(tmp_path):
    assert seconds_of(tmp_path, [("scoring", 100.0)], event(101.0, "lost", "scoring")) == [(1.0, None)]


def test_the_table_has_a_row_for_each_role_and_counts_a_runs_samples_once():
    def outcome(run, detected_s, **changes):
        return Outcome(run, "rollout", "SIGKILL", detected_s, 10.0, generated_again=4, **changes)

    found = [outcome("a", 0.5, lost=1), outcome("a", 1.5, lost=1), outcome("b", 0.7, lost=2)]
    found.append(Outcome("b", "driver", "SIGTERM", None, 30.0))
    assert table(found) == [
        ("rollout", "3", "0.7 (max 1.5)", "10.0 (max 10.0)", "0", "12", "3", "0"),
        ("driver (SIGTERM)", "1", "-", "30.0 (max 30.0)", "0", "0", "0", "0"),
    ]
