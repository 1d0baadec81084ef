"""The workers of one role in their placement group. No cluster is started."""

from __future__ import annotations

import pytest

from rlhf_dist.cluster import workers
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.workers import Workers

SHARE = RoleShare("rollout", num_workers=3, cpus=1, gpus=0, threads=1)


class FakeActors:
    """Makes actors that do nothing."""

    def options(self, **_):
        return self

    def remote(self):
        return object()


@pytest.fixture
def role(monkeypatch):
    """Three workers, the first two on node a and the third on node b."""
    monkeypatch.setattr(workers, "reserve", lambda *_, **__: "group")
    monkeypatch.setattr(workers, "options_in", lambda *_: {})
    monkeypatch.setattr(workers, "actor_class_of", lambda _: FakeActors())
    return Workers(object, SHARE, placement_timeout_s=1, arguments=lambda _: ((), {}))


@pytest.fixture
def cluster(monkeypatch):
    """Say where Ray has the workers' bundles, and which nodes live."""

    def set_to(state, nodes_of_bundles, *, alive):
        group = {"state": state, "bundles_to_node_id": dict(enumerate(nodes_of_bundles))}
        nodes = [{"NodeID": node, "Alive": node in alive} for node in ("a", "b", "c")]
        monkeypatch.setattr(workers, "placement_group_table", {"group": group}.__getitem__)
        monkeypatch.setattr(workers.ray, "nodes", lambda: nodes)

    return set_to


def rooms(role):
    return [role.has_room(index) for index in range(len(role))]


def test_a_complete_group_has_room_for_every_worker(role, cluster):
    cluster("CREATED", ["a", "a", "b"], alive={"a", "b"})
    assert rooms(role) == [True, True, True]


def test_while_the_place_of_one_is_gone_those_on_living_nodes_have_theirs(role, cluster):
    cluster("RESCHEDULING", ["a", "a", ""], alive={"a"})
    assert rooms(role) == [True, True, False]
    cluster("RESCHEDULING", ["a", "a", "b"], alive={"a"})
    assert rooms(role) == [True, True, False]
    cluster("RESCHEDULING", ["", "", "b"], alive={"b", "c"})
    assert rooms(role) == [False, False, True]
