"""The size of chaos runs, and how their settings are changed."""

from __future__ import annotations

from collections.abc import Iterable

NUM_STEPS, NUM_STEPS_OF_LONG_RUNS = 10, 20
PROMPTS_PER_STEP = 16
MAX_STALENESS = 2
ASYNCHRONOUS = ("run.deterministic=false", f"experience.max_staleness={MAX_STALENESS}")
ONE_OF_EACH = tuple(f"{role}.num_workers=1" for role in ("rollout", "scoring", "learner"))
"""Workers of a run whose point they are not: they start sooner."""
HEARTBEAT_TIMEOUT_S = 10
START_TIMEOUT_S = 75
"""Until then nobody notices that a worker which is still loading was stopped."""


def override(settings: Iterable[str], *more: str) -> list[str]:
    """Settings of the form key=value, those in `more` in place of earlier ones."""
    changed = {each.partition("=")[0] for each in more}
    return [each for each in settings if each.partition("=")[0] not in changed] + list(more)
