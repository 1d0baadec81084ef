"""Checkpoints on disk, of a learner that writes a few bytes."""

from __future__ import annotations

import pytest

from rlhf_dist.config import CheckpointSettings, parse_config
from rlhf_dist.driver.checkpoint import RunState, Score, save_checkpoint
from rlhf_dist.engines.checkpoint_files import FolderWriter

SETTINGS = {
    "run": {"dir": "runs/x", "num_steps": 9},
    "policy": {"model": "task:support-desk"},
    "reward": [{"kind": "function", "path": "rlhf_dist.tasks.support_desk:reward"}],
    "data": {"prompts": "task:support-desk"},
    "sft": {"demonstrations": "task:support-desk"},
}


class FakeLearner:
    """Writes what it holds."""

    def __init__(self, content="weights", error=None):
        self.content, self.error = content, error

    def save(self, folder):
        writer = FolderWriter(folder)
        writer.write("policy/parameters.safetensors", [self.content.encode()])
        writer.write("algorithm.pt", [b"state"])
        if self.error is not None:
            raise self.error
        return writer.finish()


@pytest.fixture
def fake_learner():
    """The class of such learners."""
    return FakeLearner


@pytest.fixture
def config():
    """A configuration, with sections replaced or added."""

    def make(**sections):
        return parse_config(SETTINGS | sections, source="test")

    return make


@pytest.fixture
def save():
    """Save a checkpoint before `next_step`, by two ranks with ZeRO stage 2."""

    def do(folder, next_step, *, score=None, learner=None, lora=None, **settings):
        state = RunState(next_step, "ppo", lora, num_ranks=2, zero_stage=2)
        if score is not None:
            metric, value = score if isinstance(score, tuple) else ("reward_mean", score)
            state = RunState(next_step, "ppo", lora, 2, 2, Score(metric, value))
        learner = learner or FakeLearner(f"weights {next_step}")
        return save_checkpoint(folder, learner.save, state, CheckpointSettings(**settings))

    return do
