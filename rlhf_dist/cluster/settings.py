"""Configuration of the cluster: deadlines of every call, and how long placement may take."""

from __future__ import annotations

from pydantic import Field

from rlhf_dist.settings import Section


class ClusterSettings(Section):
    """Deadlines. Each is the longest one call may take before the run stops and names it."""

    placement_timeout_s: float = Field(default=60, gt=0)
    """Waiting for the cluster to reserve a role's CPUs and GPUs."""
    start_timeout_s: float = Field(default=600, gt=0)
    """A worker's start: imports, loading its model, reserving its cache."""
    generate_timeout_s: float = Field(default=1800, gt=0)
    """Between two batches of finished samples from the rollout workers."""
    score_timeout_s: float = Field(default=900, gt=0)
    """Scoring one batch."""
    step_timeout_s: float = Field(default=3600, gt=0)
    """One learner step, one supervised stage, or one collective inside them."""
    weights_timeout_s: float = Field(default=900, gt=0)
    """Taking a snapshot, or loading and proving one."""
    checkpoint_timeout_s: float = Field(default=1800, gt=0)
    """Writing or reading a checkpoint or an export."""
