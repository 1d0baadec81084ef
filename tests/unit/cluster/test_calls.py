"""What a failed call to a worker means, from the errors that Ray raises. No cluster is started."""

from __future__ import annotations

import pickle
import signal

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RaySystemError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from rlhf_dist import errors
from rlhf_dist.cluster.calls import REMEDY, explain, facts_of, late
from rlhf_dist.errors import (
    DataLostError,
    RewardError,
    RunError,
    WeightsError,
    WorkerError,
    WorkerLostError,
)

WORKER, ACTION = "scoring worker 1", "score 8 samples"


def task_error(cause, method="score"):
    """What Ray raises where a method of an actor raised `cause`."""
    stored = RayTaskError(method, f"Traceback …\n{type(cause).__name__}: {cause}", cause, ip="10.0.0.1")
    return stored.as_instanceof_cause()


def test_the_users_error_comes_out_as_it_was_raised_in_the_worker():
    cause = RewardError("reward function 'a:b' raised KeyError: 'colour'")
    explained = explain(task_error(cause), WORKER, ACTION)
    assert explained is cause
    assert explained.exit_code == 5


def test_also_where_ray_could_not_make_a_class_of_both():
    cause = WeightsError("rollout worker 1 does not serve the weights")
    assert explain(RayTaskError("f", "…", cause, ip="10.0.0.1"), WORKER, ACTION) is cause


def test_also_through_several_workers():
    cause = RewardError("bad score")
    assert explain(task_error(task_error(cause), "step"), WORKER, ACTION) is cause


def test_any_other_error_names_worker_call_and_cause():
    explained = explain(task_error(ValueError("shapes differ")), WORKER, ACTION)
    assert type(explained) is WorkerError
    assert str(explained).startswith(
        "scoring worker 1 failed to score 8 samples: ValueError: shapes differ; "
    )
    assert "--resume" in str(explained)


def test_a_worker_that_died_is_said_to_have_died():
    explained = explain(ActorDiedError(), WORKER, ACTION)
    assert type(explained) is WorkerLostError
    assert str(explained).startswith(
        "scoring worker 1 died while it was to score 8 samples: "
        "The actor died unexpectedly before finishing this task. It was killed"
    )
    assert "--resume" in str(explained)


def test_a_worker_out_of_reach_counts_as_dead():
    explained = explain(ActorUnavailableError("connection lost\nmore", b"\x01" * 16), WORKER, ACTION)
    assert str(explained).startswith("scoring worker 1 died while it was to score 8 samples: ")
    assert "\n" not in str(explained)


def test_a_death_behind_another_worker_is_the_same_death():
    explained = explain(task_error(ActorDiedError()), WORKER, ACTION)
    assert str(explained).startswith("scoring worker 1 died while it was to score 8 samples: The actor died")


def test_data_that_went_with_a_node_is_no_fault_of_the_worker():
    explained = explain(ObjectLostError("00ff", None, ""), WORKER, ACTION)
    assert type(explained) is DataLostError
    assert str(explained).startswith(
        "scoring worker 1 could not score 8 samples, since what it was to read is gone with another process "
        "or node: Failed to retrieve object 00ff"
    )


@pytest.mark.parametrize("lost", [WorkerCrashedError(), TaskUnschedulableError("its node is gone")])
def test_so_is_data_that_a_lost_task_was_to_make(lost):
    assert type(explain(task_error(lost), WORKER, ACTION)) is DataLostError


def test_a_failure_of_ray_itself_has_its_name():
    explained = explain(RaySystemError("the store is gone"), WORKER, ACTION)
    assert type(explained) is WorkerError
    assert str(explained).startswith("scoring worker 1 failed to score 8 samples: RaySystemError: ")


@pytest.mark.parametrize(
    "kind",
    [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, RunError)],
    ids=lambda kind: kind.__name__,
)
def test_errors_for_people_cross_processes_whole(kind):
    error = pickle.loads(pickle.dumps(kind("what, where, and the remedy")))
    assert type(error) is kind
    assert str(error) == "what, where, and the remedy"


@pytest.mark.parametrize(
    ("action", "deadline"),
    [
        ("answer a heartbeat (recovery.heartbeat_timeout_s)", "that deadline"),
        ("load its models", "the deadline in the section `cluster`"),
    ],
)
def test_a_late_call_says_which_deadline_it_was(action, deadline):
    error = late(WORKER, action, 6)
    facts = f"{WORKER} did not {action} within 6 s; it may be stuck, or too slow for {deadline}"
    assert str(error) == f"{facts}; {REMEDY}"
    assert facts_of(error) == facts


def test_exit_codes_tell_the_kinds_of_errors_apart():
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, RunError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds if kind.__base__ in (RunError, Exception)}
    assert len(set(codes.values())) == len(codes)
    assert codes.pop("TerminatedError") == 128 + signal.SIGTERM
    assert codes["RunError"] == 1
    assert codes["ConfigError"] == 2
    assert all(0 < code < 126 for code in codes.values())
