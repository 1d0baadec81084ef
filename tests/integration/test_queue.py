"""The experience queue as an actor: bounded, in order, references only."""

from __future__ import annotations

import pytest
import ray

from rlhf_dist.cluster.experience_queue import ExperienceQueue, QueueClient
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.errors import DeadlineError
from rlhf_dist.types import BatchInfo


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session(None, verbose=False):
        yield


def info(num_samples, num_bytes=100):
    return BatchInfo(num_samples, num_samples * 10, num_bytes, oldest_version=0)


def queue_actor(**limits):
    return ray.remote(ExperienceQueue).options(num_cpus=0).remote(**limits)


def is_waiting(ref):
    return not ray.wait([ref], timeout=1.0)[0]


def test_leases_are_the_oldest_batches_and_hold_enough():
    queue = queue_actor(max_samples=100, max_bytes=10_000)
    for name, num_samples in (("a", 4), ("b", 4), ("c", 4)):
        ray.get(queue.put.remote([ray.put(name)], info(num_samples)))
    lease = ray.get(queue.lease.remote(6))
    assert ray.get(lease.batches) == ["a", "b"]
    assert lease.num_samples == 8
    assert ray.get(ray.get(queue.lease.remote(4)).batches) == ["c"]


def test_a_full_queue_makes_the_producer_wait_until_a_lease_is_acknowledged():
    queue = queue_actor(max_samples=8, max_bytes=10_000)
    ray.get(queue.put.remote([ray.put("a")], info(8)))
    waiting = queue.put.remote([ray.put("b")], info(8))
    assert is_waiting(waiting)
    lease = ray.get(queue.lease.remote(8))
    assert is_waiting(waiting), "leased samples still count"
    ray.get(queue.acknowledge.remote(lease.lease_id))
    ray.get(waiting, timeout=10)
    assert ray.get(ray.get(queue.lease.remote(8)).batches) == ["b"]


def test_bytes_are_bounded_too_and_one_batch_over_the_bound_passes_alone():
    queue = queue_actor(max_samples=1000, max_bytes=250)
    ray.get(queue.put.remote([ray.put("huge")], info(1, num_bytes=1000)))
    waiting = queue.put.remote([ray.put("small")], info(1, num_bytes=1))
    assert is_waiting(waiting)
    ray.get(queue.acknowledge.remote(ray.get(queue.lease.remote(1)).lease_id))
    ray.get(waiting, timeout=10)


def test_a_lease_waits_for_its_samples():
    queue = queue_actor(max_samples=100, max_bytes=10_000)
    lease = queue.lease.remote(5)
    ray.get(queue.put.remote([ray.put("a")], info(4)))
    assert is_waiting(lease)
    ray.get(queue.put.remote([ray.put("b")], info(4)))
    assert ray.get(lease, timeout=10).num_samples == 8


def test_a_wait_past_the_deadline_says_what_it_waited_for():
    client = QueueClient(max_samples=4, max_bytes=10_000, timeout_s=2)
    client.put(ray.put("a"), info(4))
    with pytest.raises(DeadlineError, match=r"experience queue did not take 4 samples .* within 2 s"):
        client.put(ray.put("b"), info(4))
    client.end()
