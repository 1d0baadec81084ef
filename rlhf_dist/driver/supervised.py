"""The supervised stage: from the initial policy to one that answers, before reinforcement learning."""

from __future__ import annotations

from pathlib import Path

import ray

from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.liveness import Heartbeats
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.rank_group import RankGroup
from rlhf_dist.cluster.supervised_worker import SupervisedWorker
from rlhf_dist.config import Config
from rlhf_dist.data.demonstrations import load_demonstrations
from rlhf_dist.data.settings import SFTSettings
from rlhf_dist.driver.export import export_policy
from rlhf_dist.driver.preparation import context_tokens
from rlhf_dist.engines.loading import load_tokenizer
from rlhf_dist.observability.progress import Progress

REPORTS = 5
"""Lines that the stage prints."""


def supervised_stage(
    config: Config, sft: SFTSettings, *, model: str, folder: Path, share: RoleShare, progress: Progress
) -> None:
    """Train `model` on demonstrations with the learner's ranks; the result, with tokenizer, is in `folder`.

    Raises:
        RunError: the demonstrations cannot be used, or a worker failed.
    """
    demonstrations = load_demonstrations(
        sft, load_tokenizer(model, "policy"), max_tokens=sft.max_tokens or context_tokens(config, model)
    )
    progress.say(f"supervised stage: {sft.num_steps} steps on {len(demonstrations)} demonstrations")
    if demonstrations.num_skipped:
        progress.say(f"demonstrations over the limit, left out: {demonstrations.num_skipped}")
    events, recovery = Events(), config.recovery
    heartbeats = Heartbeats(
        events, interval_s=recovery.heartbeat_interval_s, timeout_s=recovery.heartbeat_timeout_s
    )
    group = RankGroup(SupervisedWorker, share, config.cluster)
    try:
        table = ray.put(demonstrations.table)
        group.start(events, config.learner, sft, model=model, demonstrations=table, seed=config.run.seed)
        for rank in range(len(group.workers)):
            group.workers.watch(heartbeats, rank)
        _train(group, events, sft, timeout_s=config.cluster.step_timeout_s, progress=progress)
        export_policy(group, events, folder, tokenizer_of=model)
    finally:
        group.end()


def _train(
    group: RankGroup, events: Events, sft: SFTSettings, *, timeout_s: float, progress: Progress
) -> None:
    for step in range(sft.num_steps):
        action = f"do supervised step {step}"
        loss = group.call_all(events, "step", step, action=action, timeout_s=timeout_s)[0]
        if (step + 1) % max(1, sft.num_steps // REPORTS) == 0:
            progress.say(f"supervised step {step + 1}/{sft.num_steps}  loss {loss:.3f} nats a token")
