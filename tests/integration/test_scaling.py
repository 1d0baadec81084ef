"""Rollout and learner counts scale independently, over every ZeRO stage."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("num_rollout", "num_learner", "zero_stage"), [(1, 1, 0), (2, 2, 1), (3, 2, 3)])
def test_any_count_and_stage(train, small, num_rollout, num_learner, zero_stage):
    run = train(
        *small,
        f"rollout.num_workers={num_rollout}",
        f"learner.num_workers={num_learner}",
        f"learner.zero_stage={zero_stage}",
    )
    assert run.returncode == 0, run.output
    assert len(run.metrics) == 3
    assert max(step["probe_difference_max"] for step in run.metrics) <= 1e-4
    assert (run.folder / "policy" / "model.safetensors").exists()
