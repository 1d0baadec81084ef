"""What is under way between the roles. No cluster is started."""

from __future__ import annotations

from types import SimpleNamespace

from rlhf_dist.driver.flow import Flow, Roles


def test_when_the_learner_is_gone_the_pool_forgets_who_could_not_map_its_memory(config):
    told = []
    rollout = SimpleNamespace(unpublish=lambda: told.append("unpublish"))
    scoring = SimpleNamespace(handle=lambda _: None)
    flow = Flow(config(), Roles(rollout, scoring, queue=None, learner=None), None, ())
    flow.unpublish()
    assert told == ["unpublish"]
