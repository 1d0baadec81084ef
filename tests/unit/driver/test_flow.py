"""What is under way between the roles. No cluster is started."""

from __future__ import annotations

from types import SimpleNamespace

from rlhf_dist.driver.flow import Flow, Roles
from rlhf_dist.types import RolloutReport, ServedVersion


def test_when_the_learner_is_gone_the_pool_forgets_who_could_not_map_its_memory(config):
    told = []
    rollout = SimpleNamespace(unpublish=lambda: told.append("unpublish"))
    scoring = SimpleNamespace(handle=lambda _: None)
    flow = Flow(config(), Roles(rollout, scoring, queue=None, learner=None), None, ())
    flow.unpublish()
    assert told == ["unpublish"]


class FakeRoles:
    """Records what the flow has the roles do; the queue answers when it is told to."""

    def __init__(self):
        self.scored, self.asked = [], []
        self.lives = {0: 0, 1: 0}
        workers = SimpleNamespace(life=lambda index: self.lives[index], name="rollout worker {}".format)
        rollout = SimpleNamespace(workers=workers)
        scoring = SimpleNamespace(
            handle=lambda _: None, score=lambda _, batch, *__: self.scored.append(batch)
        )
        queue = SimpleNamespace(served=lambda proofs: proofs)
        self.roles = Roles(rollout, scoring, queue, learner=None)

    def flow(self, config):
        flow = Flow(config, self.roles, None, ())
        flow.queue.ask = lambda make, then, **_: self.asked.append((make(), then))
        flow._published = PUBLISHED
        return flow


PUBLISHED = SimpleNamespace(manifest=SimpleNamespace(version=5))


def proof(index, version):
    return ServedVersion(f"rollout worker {index}", version, 0.0, load_s=0, probe_s=0)


def serve(flow, index, version):
    flow._serving.add(index)
    flow._on_served(PUBLISHED, proof(index, version))


def test_no_sample_is_scored_before_the_proof_of_its_version_is_in_the_journal(config):
    fake = FakeRoles()
    flow = fake.flow(config())
    serve(flow, 0, 4)
    flow._on_rollouts(0, "early", RolloutReport((1,), 4, 0.0))
    assert fake.scored == []
    (noted, then) = fake.asked.pop()
    assert noted == [proof(0, 4)]
    then(None)
    assert fake.scored == ["early"]
    flow._on_rollouts(0, "of version 4", RolloutReport((2,), 4, 0.0))
    flow._on_rollouts(0, "went on under version 5", RolloutReport((3,), 5, 0.0))
    flow._on_rollouts(1, "of another worker", RolloutReport((4,), 4, 0.0))
    assert fake.scored == ["early", "of version 4"]
    serve(flow, 0, 5)
    fake.asked.pop()[1](None)
    assert fake.scored == ["early", "of version 4", "went on under version 5"]


def test_what_a_lost_worker_had_not_proved_is_never_scored(config):
    fake = FakeRoles()
    flow = fake.flow(config())
    serve(flow, 0, 5)
    (_, then) = fake.asked.pop()
    flow._on_rollouts(0, "batch", RolloutReport((1,), 5, 0.0))
    flow.leave(0)
    fake.lives[0] += 1
    then(None)
    serve(flow, 0, 5)
    fake.asked.pop()[1](None)
    assert fake.scored == []
