"""The experience queue as an actor: bounded, exact, references only, and the same after a crash."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import ray

from rlhf_dist.cluster.calls import Call, wait_for
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.experience_queue import QueueClient
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.errors import DeadlineError, RewardError, RunError, WorkerError
from rlhf_dist.experience.dead_letter import read_dead_letters
from rlhf_dist.experience.dispatch import WorkerLoad
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.types import BatchInfo, BatchPlace, PromptAttempt, SampleInfo

IDLE = [WorkerLoad(0, 0, 10, 100)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session(None, verbose=False):
        yield


@pytest.fixture
def make(tmp_path):
    """Queues of two prompts a step, one sample each, on the same journal."""
    clients = []
    table = pa.table({"prompt": [f"prompt {row}" for row in range(4)], "columns": ["{}"] * 4})
    prompts = ray.put(table)

    def make(*, first_step=0, in_order=True, **settings):
        arguments = {"num_steps": 10, "prompts_per_step": 2, "samples_per_prompt": 1}
        client = QueueClient(
            ExperienceSettings(**settings),
            tmp_path,
            first_step=first_step,
            in_order=in_order,
            prompts=prompts,
            order=PromptOrder(table.num_rows, seed=0, shuffle=False),
            **arguments,
        )
        clients.append(client)
        done(client.start())
        return client

    yield make
    for client in clients:
        client.end()


def info(*ordinals, version=0, num_bytes=100):
    samples = tuple(SampleInfo(ordinal, 0, 0, version, version, 10) for ordinal in ordinals)
    return BatchInfo(samples, num_bytes, BatchPlace(f"segment-{ordinals[0]}", version))


def put(queue, name, *ordinals, **changes):
    return queue.put(ray.put(name), info(*ordinals, **changes))


def done(call):
    return wait_for(call, 30)


def is_waiting(call):
    return not ray.wait([call.ref], timeout=1.0)[0]


def leased(lease):
    """By batch, the rows on loan."""
    return {ray.get(batch.ref[0]): batch.rows.rows for batch in lease.batches}


def test_a_lease_is_rows_of_the_batches_that_hold_the_next_prompts(make):
    queue = make(max_staleness=1)
    done(put(queue, "a", 3, 0))
    done(put(queue, "b", 1, 2))
    first, second = done(queue.lease(0)), done(queue.lease(1))
    assert leased(first) == {"a": (1,), "b": (0,)}
    assert leased(second) == {"a": (0,), "b": (1,)}
    assert first.num_samples == second.num_samples == 2


def test_what_finished_first_is_trained_first_where_order_does_not_matter(make):
    queue = make(in_order=False, max_staleness=1)
    done(queue.dispatch(IDLE, version=0))
    done(put(queue, "a", 3, 2))
    assert leased(done(queue.lease(0))) == {"a": (0, 1)}


def test_prompts_are_handed_out_as_far_ahead_as_staleness_allows(make):
    queue = make(max_staleness=1)
    assert [each.ordinal for each in done(queue.dispatch(IDLE, version=0))[0]] == [0, 1, 2, 3]
    assert done(queue.dispatch(IDLE, version=0)) == {}
    assert [each.ordinal for each in done(queue.dispatch(IDLE, version=1))[0]] == [4, 5]


def test_a_second_copy_of_a_sample_does_not_count(make, tmp_path):
    queue = make()
    done(put(queue, "a", 0, 1))
    done(queue.put(ray.put("again"), info(1, version=0)))
    assert leased(done(queue.lease(0))) == {"a": (0, 1)}
    assert {"event": "dropped", "reason": "duplicate", "samples": [[1, 0, 0]]} in log(tmp_path)


def test_a_sample_that_is_too_old_is_never_leased(make, tmp_path):
    queue = make(max_staleness=0, first_step=0)
    done(put(queue, "a", 0, 1))
    done(queue.acknowledge(done(queue.lease(0)), "digest"))
    done(put(queue, "old", 2, 3, version=0))
    lease = queue.lease(1)
    assert is_waiting(lease)
    done(put(queue, "new", 2, 3, version=1))
    assert leased(done(lease)) == {"new": (0, 1)}
    stale = [record for record in log(tmp_path) if record.get("reason") == "stale"]
    assert sorted(sample for record in stale for sample in record["samples"]) == [[2, 0, 0], [3, 0, 0]]


def test_a_full_queue_makes_the_producer_wait_until_a_lease_is_acknowledged(make):
    queue = make(max_samples=2)
    done(put(queue, "a", 0, 1))
    waiting = put(queue, "b", 2, 3)
    assert is_waiting(waiting)
    lease = done(queue.lease(0))
    assert is_waiting(waiting), "leased samples still count"
    done(queue.acknowledge(lease, "digest"))
    done(waiting)


def test_bytes_are_bounded_too_and_one_batch_over_the_bound_passes_alone(make):
    queue = make(max_gib=250 / 2**30)
    done(put(queue, "huge", 0, 1, num_bytes=1000))
    waiting = put(queue, "small", 2, 3, num_bytes=1)
    assert is_waiting(waiting)
    done(queue.acknowledge(done(queue.lease(0)), "digest"))
    done(waiting)


def test_a_queue_too_small_for_a_step_says_so_instead_of_waiting_for_itself(make):
    queue = make(max_gib=150 / 2**30)
    done(put(queue, "a", 0))
    waiting = put(queue, "b", 1)
    assert is_waiting(waiting)
    lease = queue.lease(0)
    with pytest.raises(
        RunError, match=r"the samples of a learner step do not fit; raise experience\.max_gib"
    ):
        done(waiting)
    assert is_waiting(lease)


def test_a_lease_that_is_not_acknowledged_in_time_is_taken_back(make, tmp_path):
    queue = make(lease_timeout_s=0.5)
    done(put(queue, "a", 0, 1))
    late = done(queue.lease(0))
    assert is_waiting(queue.lease(1)), "a second passes"
    again = done(queue.lease(0))
    assert leased(again) == leased(late)
    assert done(queue.acknowledge(late, "digest")) == 0, "the samples were the same"
    trained = [record for record in log(tmp_path) if record["event"] == "trained"]
    assert trained == [{"event": "trained", "step": 0, "policy_digest": "digest"}]


def test_after_a_crash_a_step_is_leased_again_with_the_samples_it_had(make):
    queue = make()
    done(put(queue, "a", 0, 1))
    before = done(queue.lease(0))
    queue.end()
    again = done(make().lease(0))
    assert [batch.rows for batch in again.batches] == [batch.rows for batch in before.batches]
    assert all(batch.ref == [] for batch in again.batches), "they are in the journal alone"


def test_a_batch_that_was_put_twice_counts_once(make, tmp_path):
    queue = make(max_samples=4)
    done(put(queue, "a", 0, 1))
    done(put(queue, "a", 0, 1))
    done(put(queue, "b", 2, 3))
    done(queue.acknowledge(done(queue.lease(0)), "digest"))
    done(put(queue, "a", 0, 1))
    done(put(queue, "c", 4, 5))
    assert not [record for record in log(tmp_path) if record["event"] == "dropped"]


def actor(queue, method, *arguments):
    """Calls what the driver's end has no method for."""
    return done(Call(getattr(queue._actor, method).remote(*arguments), "experience queue", method))


def test_a_prompt_that_is_given_up_is_passed_over_and_its_letter_has_the_reasons(make, tmp_path):
    queue = make()
    handed_out = done(queue.dispatch(IDLE, version=0))[0]
    assert [each.ordinal for each in handed_out] == [0, 1]
    lease = queue.lease(0)
    done(put(queue, "a", 0))
    actor(queue, "give_up", [(1, ("reward function 'f' raised KeyError: 'x'",))])
    assert [each.ordinal for each in done(queue.dispatch(IDLE, version=0))[0]] == [2]
    done(put(queue, "b", 2))
    assert leased(done(lease)) == {"a": (0,), "b": (0,)}
    assert read_dead_letters(tmp_path) == [
        {
            "ordinal": 1,
            "row": 1,
            "reasons": ["reward function 'f' raised KeyError: 'x'"],
            "prompt": "prompt 1",
            "columns": {},
        }
    ]
    assert [record for record in log(tmp_path) if record["event"] == "dropped"] == []
    actor(queue, "give_up", [(1, ("again",)), (0, ("it is leased",))])
    done(put(queue, "late", 1))
    assert len(read_dead_letters(tmp_path)) == 1
    dropped = [record for record in log(tmp_path) if record["event"] == "dropped"]
    assert dropped == [{"event": "dropped", "reason": "failed", "samples": [[1, 0, 0]]}]
    assert done(queue.acknowledge(done(queue.lease(0)), "digest")) == 1


def test_more_prompts_given_up_than_allowed_stop_the_run_with_the_last_reason(make, tmp_path):
    queue = make(max_staleness=1)
    done(queue.dispatch(IDLE, version=0))
    actor(queue, "give_up", [(0, ("the first may always fail",))])
    message = (
        r"^prompts given up: 2 of 4 \(50\.0%\), more than experience\.max_failed_share=0\.1 allows; the "
        r"last one was prompt 3: no colour; all of them, with their reasons, are in .*/dead-letter\.jsonl; "
    )
    with pytest.raises(RewardError, match=message):
        actor(queue, "give_up", [(3, ("no colour",))])
    assert [letter["ordinal"] for letter in read_dead_letters(tmp_path)] == [0, 3]
    assert [record["ordinal"] for record in log(tmp_path) if record["event"] == "failed"] == [0, 3]


def test_with_a_share_of_0_the_first_prompt_given_up_stops_the_run(make):
    queue = make(max_failed_share=0)
    done(queue.dispatch(IDLE, version=0))
    with pytest.raises(RewardError, match=r"^prompts given up: 1 of 2 .*_share=0 allows; .* 0: no colour;"):
        actor(queue, "give_up", [(0, ("no colour",))])


def test_the_prompts_of_a_lost_worker_are_handed_out_again_until_they_are_given_up(make, tmp_path):
    queue = make(max_attempts=2)
    done(queue.dispatch(IDLE, version=0))
    assert actor(queue, "lost", "rollout worker 0") == 2
    assert actor(queue, "lost", "rollout worker 0") == 0
    again = done(queue.dispatch(IDLE, version=0))[0]
    assert again == [PromptAttempt(0, 1, (0,)), PromptAttempt(1, 1, (0,))]
    with pytest.raises(WorkerError, match=r"^prompts given up: 2 of 2 .* 1: rollout worker 0 was lost; all"):
        actor(queue, "lost", "rollout worker 0")
    assert [letter["reasons"] for letter in read_dead_letters(tmp_path)] == [
        ["rollout worker 0 was lost", "rollout worker 0 was lost"]
    ] * 2


def test_a_queue_that_died_comes_back_with_what_was_under_way(make):
    queue = make(max_staleness=1)
    handed_out = done(queue.dispatch(IDLE, version=0))[0]
    done(put(queue, "a", 0, 1))
    first = done(queue.lease(0))
    done(queue.acknowledge(first, "digest"))
    queue.end()
    queue = make(max_staleness=1, first_step=1)
    assert actor(queue, "adopt", handed_out, 0, "rollout worker 0") == [0, 1]
    assert [each.ordinal for each in done(queue.dispatch(IDLE, version=1))[0]] == [4, 5]
    done(put(queue, "b", 2, 3))
    assert leased(done(queue.lease(1))) == {"b": (0, 1)}


def test_a_wait_past_the_deadline_says_what_it_waited_for(make):
    queue = make(max_samples=2)
    done(put(queue, "a", 0, 1))
    events = Events()
    with pytest.raises(DeadlineError, match=r"experience queue did not take 2 samples .* within 2 s"):
        events.wait_for(put(queue, "b", 2, 3), timeout_s=2)


def test_while_one_call_is_waited_for_others_are_handled_and_their_deadlines_hold(make):
    queue = make()
    events, seen = Events(), []
    events.expect(put(queue, "a", 0), lambda _: seen.append("a"), timeout_s=30)
    events.expect(put(queue, "b", 1), lambda _: seen.append("b"), timeout_s=30)
    assert events.wait_for(queue.lease(0), timeout_s=30).num_samples == 2
    assert sorted(seen) == ["a", "b"]
    events.expect(queue.lease(1), lambda _: seen.append("never"), timeout_s=1)
    with pytest.raises(DeadlineError, match="did not lease the samples of step 1 within 1 s"):
        events.wait_for(Call(queue.lease(2).ref, "learner", "wait"), timeout_s=30)


def log(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
