"""A configuration that a bench may be pointed at."""

from __future__ import annotations

import pytest
import yaml

SETTINGS = {
    "run": {"dir": "runs/a", "num_steps": 3, "seed": 4},
    "policy": {"model": "task:support-desk"},
    "reward": [{"kind": "function", "path": "rlhf_dist.tasks.support_desk:reward"}],
    "data": {"prompts": "task:support-desk"},
    "sft": {"demonstrations": "task:support-desk"},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4},
    "algorithm": {"name": "ppo", "num_epochs": 7, "clip_low": 0.1},
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """It in a file, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path
