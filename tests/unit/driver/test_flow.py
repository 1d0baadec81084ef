"""What is under way between the roles. No cluster is started."""

from __future__ import annotations

from types import SimpleNamespace

from rlhf_dist.driver.flow import Flow, Roles, _UnderWay
from rlhf_dist.types import AttemptId, PromptAttempt, RolloutReport, ServedVersion


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
        queue = SimpleNamespace(served=lambda proofs: proofs, samples_lost=lambda lost: lost)
        self.roles = Roles(rollout, scoring, queue, learner=None)

    def flow(self, config):
        flow = Flow(config, self.roles, None, ())
        flow.queue.ask = lambda make, then, **_: self.asked.append((make(), then))
        flow._published = PUBLISHED
        return flow


PUBLISHED = SimpleNamespace(manifest=SimpleNamespace(version=5))


def proof(index, version):
    return ServedVersion(f"rollout worker {index}", version, 0.0, load_s=0, probe_s=0)


def report(*ordinals, version, attempt=0):
    return RolloutReport(tuple(AttemptId(ordinal, attempt) for ordinal in ordinals), version, 0.0)


def serve(flow, index, version):
    flow._serving.add(index)
    flow._on_served(PUBLISHED, proof(index, version))


def test_no_sample_is_scored_before_the_proof_of_its_version_is_in_the_journal(config):
    fake = FakeRoles()
    flow = fake.flow(config())
    serve(flow, 0, 4)
    flow._on_rollouts(0, "early", report(1, version=4))
    assert fake.scored == []
    (noted, then) = fake.asked.pop()
    assert noted == [proof(0, 4)]
    then(None)
    assert fake.scored == ["early"]
    flow._on_rollouts(0, "of version 4", report(2, version=4))
    flow._on_rollouts(0, "went on under version 5", report(3, version=5))
    flow._on_rollouts(1, "of another worker", report(4, version=4))
    assert fake.scored == ["early", "of version 4"]
    serve(flow, 0, 5)
    fake.asked.pop()[1](None)
    assert fake.scored == ["early", "of version 4", "went on under version 5"]


def test_what_a_lost_worker_had_not_proved_is_never_scored(config):
    fake = FakeRoles()
    flow = fake.flow(config())
    serve(flow, 0, 5)
    (_, then) = fake.asked.pop()
    flow._on_rollouts(0, "batch", report(1, version=5))
    flow.leave(0)
    fake.lives[0] += 1
    then(None)
    serve(flow, 0, 5)
    fake.asked.pop()[1](None)
    assert fake.scored == []


def flow_with_prompt(config, fake, *, attempt, samples):
    """Prompt 7 is under way on worker 0 in an attempt, and version 5 is served."""
    flow = fake.flow(config())
    serve(flow, 0, 5)
    fake.asked.pop()[1](None)
    handed_out = PromptAttempt(7, attempt, tuple(range(samples)))
    flow._under_way[7] = _UnderWay(handed_out, "rollout worker 0", 5, set(handed_out.samples), samples)
    return flow


def test_a_prompt_whose_sample_was_lost_is_generated_again_once_its_others_are_generated(config):
    fake = FakeRoles()
    flow = flow_with_prompt(config, fake, attempt=1, samples=2)
    flow._on_rollouts(0, "first", report(7, version=5, attempt=1))
    flow._on_rollouts_lost((AttemptId(7, 1),), "gone with a node")
    assert fake.asked == [], "the worker still generates the other one"
    flow._on_rollouts(0, "second", report(7, version=5, attempt=1))
    (question, _) = fake.asked.pop()
    assert question == [(PromptAttempt(7, 1, (0, 1)), "gone with a node")]
    assert 7 not in flow._under_way


def test_what_was_lost_of_an_earlier_attempt_does_not_end_the_one_under_way(config):
    fake = FakeRoles()
    flow = flow_with_prompt(config, fake, attempt=1, samples=1)
    flow._on_rollouts(0, "late sample of the attempt before", report(7, version=5, attempt=0))
    flow._on_rollouts_lost((AttemptId(7, 0),), "gone with a node")
    flow._on_rollouts(0, "of this attempt", report(7, version=5, attempt=1))
    assert fake.asked == []
    assert flow._under_way[7].num_to_generate == 0
