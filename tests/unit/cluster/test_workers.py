"""The workers of one role in their placement group. No cluster is started."""

from __future__ import annotations

import pytest

from rlhf_dist.cluster import workers
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.workers import Workers

SHARE = RoleShare("rollout", num_workers=3, cpus=1, gpus=0, threads=1)


class FakeActors:
    """Makes actors that are only their place: a group, and the bundle in it."""

    def options(self, *, place):
        self._place = place
        return self

    def remote(self):
        return self._place


class FakeCluster:
    """Three nodes, and what Ray says of placement groups."""

    def __init__(self):
        self.alive = {"a", "b", "c"}
        self.groups = {}
        self.num_made = 0

    def make(self, state, *nodes):
        self.num_made += 1
        name = f"group {self.num_made}"
        self.groups[name] = {"state": state, "bundles_to_node_id": dict(enumerate(nodes))}
        return name

    def reserve(self, share, *, together, timeout_s):
        assert timeout_s == 1
        if together:
            return [self.make("CREATED", "a", "a", "b")] * share.num_workers
        return [self.make("CREATED", node) for node in ("a", "a", "b")]

    def nodes(self):
        return [{"NodeID": node, "Alive": node in self.alive} for node in ("a", "b", "c")]


@pytest.fixture
def cluster(monkeypatch):
    fake = FakeCluster()
    monkeypatch.setattr(workers, "reserve", fake.reserve)
    monkeypatch.setattr(workers, "ask_for_room", lambda *_, **__: fake.make("PENDING"))
    monkeypatch.setattr(workers, "remove_placement_group", fake.groups.pop)
    monkeypatch.setattr(workers, "placement_group_table", fake.groups.__getitem__)
    monkeypatch.setattr(workers, "options_in", lambda group, bundle, _: {"place": (group, bundle)})
    monkeypatch.setattr(workers, "actor_class_of", lambda _: FakeActors())
    monkeypatch.setattr(workers.ray, "nodes", fake.nodes)
    monkeypatch.setattr(workers.ray, "kill", lambda *_, **__: None)
    return fake


@pytest.fixture
def make(cluster):
    """Three workers, the first two on node a and the third on node b."""
    assert cluster.num_made == 0

    def role(*, together):
        return Workers(object, SHARE, placement_timeout_s=1, arguments=lambda _: ((), {}), together=together)

    return role


def rooms(role):
    return [role.has_room(index) for index in range(len(role))]


@pytest.mark.parametrize("together", [False, True])
def test_while_all_nodes_live_every_worker_has_its_place(make, cluster, together):
    role = make(together=together)
    assert rooms(role) == [True, True, True]
    assert role.actors == (
        [("group 1", 0), ("group 1", 1), ("group 1", 2)]
        if together
        else [("group 1", 0), ("group 2", 0), ("group 3", 0)]
    )
    role.end()
    assert cluster.groups == {}


@pytest.mark.parametrize("state", ["CREATED", "RESCHEDULING"])
def test_a_worker_whose_place_is_gone_gets_another_one_and_the_others_keep_theirs(make, cluster, state):
    """Ray may not have noticed yet that a group has lost its node."""
    role = make(together=False)
    cluster.alive.remove("b")
    cluster.groups["group 3"]["state"] = state
    assert rooms(role) == [True, True, False]
    assert cluster.groups.keys() == {"group 1", "group 2", "group 4"}
    assert rooms(role) == [True, True, False], "the new one waits for its place"
    assert cluster.num_made == 4
    cluster.groups["group 4"] = {"state": "CREATED", "bundles_to_node_id": {0: "c"}}
    assert rooms(role) == [True, True, True]
    role.replace(2)
    assert role.actors[2] == ("group 4", 0)


def test_workers_that_are_together_move_together(make, cluster):
    role = make(together=True)
    cluster.alive.remove("b")
    cluster.groups["group 1"]["state"] = "RESCHEDULING"
    assert rooms(role) == [False, False, False]
    assert cluster.groups.keys() == {"group 2"}
    cluster.groups["group 2"] = {"state": "CREATED", "bundles_to_node_id": dict(enumerate("aac"))}
    assert rooms(role) == [True, True, True]
    role.replace(2)
    assert role.actors[2] == ("group 2", 2)
