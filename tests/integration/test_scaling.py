"""Rollout and learner counts scale independently, over every ZeRO stage, with and without a value model."""

from __future__ import annotations

import pytest


def test_counts_of_their_own_zero_3_and_grpo(train, small):
    """Elsewhere runs have two and two, or one and one, with ZeRO-2 or none, and PPO."""
    overrides = [each for each in small if not each.startswith("algorithm.")]
    run = train(
        *overrides,
        *("rollout.num_workers=3", "learner.num_workers=2", "learner.zero_stage=3"),
        *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4"),
        "algorithm={name: grpo, num_epochs: 2}",
    )
    assert run.returncode == 0, run.output
    assert [metrics["step"] for metrics in run.metrics] == [0, 1, 2]
    for metrics in run.metrics:
        assert metrics["num_samples"] == 16
        assert metrics["probe_difference_max"] <= 1e-4
        assert "value_loss" not in metrics
        assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-3)
    assert (run.folder / "policy" / "model.safetensors").exists()
