"""Real processes killed at seeded moments: nothing is lost, nothing counts twice, and the run ends as it
would have. `make chaos ARGS="--chaos-runs 20 --chaos-seed 7"` is the long version; a seed repeats its run."""

from __future__ import annotations

import signal
import time

import pytest
from invariants import assert_same_run, check_invariants
from kills import TITLES, Kill, make_schedule
from outcome import outcomes
from shape import ASYNCHRONOUS, MAX_STALENESS, ONE_OF_EACH, PROMPTS_PER_STEP, override
from strikes import count_lines, disturb, processes_of

LOST_WORKERS = 9
SEED, ROLES = 185, (*TITLES, "driver")
"""Of the schedule that every `make test` repeats."""


@pytest.fixture
def survive(start, chaotic, chaos_outcomes, num_steps, request):
    """Put a run through a schedule, check its journal, and note what the kills did."""

    def run(schedule, *more, max_staleness=0):
        disturbed = disturb(start, override(chaotic, *more), schedule)
        assert disturbed.returncode == 0, disturbed.output
        assert [step["step"] for step in disturbed.metrics] == list(range(num_steps))
        toll = check_invariants(disturbed.folder, num_samples=num_steps * PROMPTS_PER_STEP)
        chaos_outcomes.extend(
            outcomes(
                request.node.name,
                disturbed,
                toll,
                prompts_ahead=(max_staleness + 1) * PROMPTS_PER_STEP,
                samples_per_prompt=1,
            )
        )
        assert (toll.lost, toll.doubled) == (0, 0)
        return disturbed

    return run


def test_every_role_is_killed_and_the_run_ends_as_if_nothing_had_happened(survive, undisturbed, num_steps):
    schedule = make_schedule(SEED, num_steps=num_steps, num_kills=6, roles=ROLES)
    assert {kill.role for kill in schedule} == set(ROLES)
    disturbed = survive(schedule)
    assert disturbed.missed == []
    hit = {event["role"] for event in disturbed.events if event["event"] == "lost"}
    assert hit == set(TITLES)
    assert_same_run(disturbed.folder, undisturbed)


def test_a_run_is_terminated_and_resumed_and_loses_a_worker_while_generation_runs_ahead(survive):
    schedule = (
        Kill("driver", "SIGTERM", 0, after_steps=2, during_recovery=False, method=None, delay_s=0.3),
        Kill("rollout", "SIGKILL", 0, after_steps=6, during_recovery=False, method="load_weights", delay_s=0),
    )
    disturbed = survive(schedule, *ASYNCHRONOUS, *ONE_OF_EACH, max_staleness=MAX_STALENESS)
    terminated, resumed = (event for event in disturbed.events if event["event"] in ("terminated", "resumed"))
    assert (terminated["event"], resumed["event"]) == ("terminated", "resumed")
    assert terminated["checkpoint"] == f"step-{terminated['step']:06d}"
    assert resumed["step"] == terminated["step"], "it goes on with the step that it was told to end before"


def test_a_worker_that_is_lost_again_and_again_ends_the_run_and_is_named(start, chaotic):
    limits = (*ONE_OF_EACH, "recovery.max_restarts=2", "recovery.window_s=600", "run.num_steps=1000")
    command = start(*override(chaotic, *limits))
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(lambda: count_lines(metrics) > 0, "the first step")
    second = start(*override(chaotic, *limits), "--resume", folder=command.folder).wait()
    assert second.returncode == 2
    assert "is in use by another run" in second.output
    killed: set[int] = set()
    while command.process.poll() is None:
        for queue in processes_of(command, "queue"):
            if queue.pid not in killed:
                killed.add(queue.pid)
                queue.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    run = command.wait()
    assert len(killed) == 3
    assert run.returncode == LOST_WORKERS
    (error,) = [line for line in run.output.splitlines() if line.startswith("error:")]
    assert "experience queue" in error
    assert "recovery.max_restarts=2" in error
    assert "died while it was to" in error, "the last error"
    command.assert_nothing_left()


@pytest.mark.timeout(1800)
def test_long(survive, undisturbed, num_steps, pytestconfig, chaos_seed):
    """Every role, the driver and the whole machine; every other run asynchronous, the rest bit for bit."""
    num_kills = pytestconfig.getoption("--chaos-kills")
    schedule = make_schedule(chaos_seed, num_steps=num_steps, num_kills=num_kills)
    if chaos_seed % 2:
        survive(schedule, *ASYNCHRONOUS, max_staleness=MAX_STALENESS)
    else:
        assert_same_run(survive(schedule).folder, undisturbed)
