"""A cluster of two hosts loses one of them, or the cable between them: what is left goes on, nobody waits for
ever, and whoever was cut off serves nothing that is out of date."""

from __future__ import annotations

import signal

import pytest
from invariants import check_invariants
from kills import TITLES
from shape import PROMPTS_PER_STEP, override
from strikes import TERMINATED, count_lines, title_of
from two_hosts import two_hosts, what_is_missing

from rlhf_dist.observability.run_events import read_run_events

MISSING = what_is_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

HEAD_CPUS, OTHER_CPUS = 7, 6
PLACEMENT = (
    "rollout.cpus_per_worker=4",
    "scoring.cpus_per_worker=2",
    "learner.cpus_per_worker=0.5",
    *(f"{role}.threads_per_worker=1" for role in ("rollout", "scoring", "learner")),
)
"""One rollout worker and one scoring worker find room on each host; the learner does on the head alone."""
RUN_DEADLINE_S = 240
NOTICED_DEADLINE_S = 60


@pytest.fixture
def begin(start, chaotic):
    """Start a run on both hosts; returns when its first step is done."""

    def run(hosts, *more):
        hosts.start(head_cpus=HEAD_CPUS, other_cpus=OTHER_CPUS)
        joined = ("--address", hosts.address)
        options = {"inside": hosts.head.inside, "environment": hosts.environment}
        command = start(*override(chaotic, *PLACEMENT, *more), *joined, **options)
        wait_for_step(command, 1)
        assert {"rollout", "scoring"} <= roles_on(hosts.other)
        assert "learner" not in roles_on(hosts.other)
        return command

    return run


def wait_for_step(command, num_steps):
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(lambda: count_lines(metrics) >= num_steps, f"step {num_steps}")


def num_steps_of(command):
    return count_lines(command.folder / "metrics.jsonl")


def roles_on(host):
    titles = {title_of(process.pid).split(".")[0] for process in host.processes()}
    return {role for role, title in TITLES.items() if title in titles}


def workers(command, event):
    """That an event was about, in order."""
    lines = read_run_events(command.folder / "events.jsonl")
    return [each["worker"] for each in lines if each["event"] == event]


def finish(command, hosts, returncode):
    """Check how the run ended, and what its journal says of the steps that it did."""
    run = command.wait(RUN_DEADLINE_S)
    assert run.returncode == returncode, run.output
    toll = check_invariants(run.folder, num_samples=len(run.metrics) * PROMPTS_PER_STEP)
    assert (toll.lost, toll.doubled) == (0, 0)
    hosts.wait_until(lambda: roles_on(hosts.head) == set(), "end of all workers", timeout_s=30)
    assert roles_on(hosts.other) == set()
    return run


def test_a_host_that_is_lost_is_done_without(begin, num_steps):
    with two_hosts(node_lost_after_s=4) as hosts:
        command = begin(hosts)
        hosts.other.kill()
        run = finish(command, hosts, returncode=0)
        assert len(run.metrics) == num_steps
        kinds = {each.rsplit(maxsplit=1)[0] for each in workers(command, "lost")}
        assert {"rollout worker", "scoring worker"} <= kinds
        back = {each.rsplit(maxsplit=1)[0] for each in workers(command, "recovered")}
        assert not {"rollout worker", "scoring worker"} & back, "there was no room for them"


@pytest.mark.usefixtures("long_suite")
@pytest.mark.parametrize(
    ("node_lost_after_s", "rejoins"), [(60, False), (4, True)], ids=["reconnected", "joined-anew"]
)
def test_a_host_that_is_cut_off_is_done_without_until_it_is_back(begin, node_lost_after_s, rejoins):
    """The driver notices by its heartbeats where Ray is patient; else Ray gives the node up, which then ends
    by itself when it hears of that, and may join again."""
    with two_hosts(node_lost_after_s=node_lost_after_s) as hosts:
        command = begin(hosts, "run.num_steps=1000")
        hosts.other.pull_the_cable()
        command.wait_until(lambda: len(workers(command, "lost")) >= 2, "two losses", NOTICED_DEADLINE_S)
        wait_for_step(command, num_steps_of(command) + 1)
        hosts.other.plug_the_cable_in()
        if rejoins:
            hosts.wait_until(lambda: not hosts.other.processes(), "end of the lost node", timeout_s=60)
            hosts.start_other(num_cpus=OTHER_CPUS)
        command.wait_until(lambda: len(workers(command, "recovered")) >= 2, "two recoveries", timeout_s=120)
        wait_for_step(command, num_steps_of(command) + 2)
        command.send(signal.SIGTERM)
        finish(command, hosts, returncode=TERMINATED)
