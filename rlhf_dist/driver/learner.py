"""The learner as a run starts it, and as a replay of that run starts it again: with the same arguments."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.config import Config
from rlhf_dist.driver.preparation import Models


def start_learner(
    learner: LearnerGroup, events: Events, config: Config, models: Models, journal: Path
) -> None:
    """Have the ranks load, as on the first step. Raises as `LearnerGroup.start`."""
    learner.start(
        events,
        config.learner,
        config.algorithm,
        policy_model=models.policy,
        value_model=models.value,
        num_steps=config.run.num_steps,
        seed=config.run.seed,
        journal=journal,
        snapshots_on_gpu=config.snapshots_on_gpu,
    )
