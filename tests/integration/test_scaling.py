"""Rollout and learner counts scale independently, over every ZeRO stage."""

from __future__ import annotations


def test_counts_of_their_own_and_zero_3(train, small):
    """Elsewhere runs have two and two, or one and one, with ZeRO-2 or none."""
    run = train(*small, "rollout.num_workers=3", "learner.num_workers=2", "learner.zero_stage=3")
    assert run.returncode == 0, run.output
    assert len(run.metrics) == 3
    assert max(step["probe_difference_max"] for step in run.metrics) <= 1e-4
    assert (run.folder / "policy" / "model.safetensors").exists()
