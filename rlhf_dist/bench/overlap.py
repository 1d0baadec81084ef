"""How well generation and learning of a run overlap, and what the processes between them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.bench.processes import Usage, is_actor

PHASES = ("waiting", "learning", "weights", "rollout", "scoring")
"""Of a step, as its metrics name them: three of the driver's, one after the other, and two of other workers,
which run meanwhile."""


@dataclass(frozen=True)
class CpuTime:
    """CPU seconds of a run's processes in some time."""

    driver_s: float
    queue_s: float
    all_s: float

    @property
    def driver_share(self) -> float:
        """Of what all took."""
        return self.driver_s / self.all_s

    @property
    def queue_share(self) -> float:
        """Of what all took."""
        return self.queue_s / self.all_s


@dataclass(frozen=True)
class Timing:
    """A step of a run, on average over the measured ones."""

    num_steps: int
    wall_s: float
    """From one step's end to the next."""
    phases_s: dict[str, float]
    cpu: CpuTime
    """Of all measured steps together."""

    @property
    def bubble(self) -> float:
        """Share of the time in which the learner has nothing to learn from."""
        return self.phases_s["waiting"] / self.wall_s

    @property
    def larger_s(self) -> float:
        """What a step takes at least: generation, or learning with its weights."""
        return max(self.phases_s["rollout"], self.phases_s["learning"] + self.phases_s["weights"])

    @property
    def hidden(self) -> float:
        """The larger of both against the whole step: 1 where all of the smaller is hidden behind it."""
        return self.larger_s / self.wall_s


def timing(steps: Sequence[Mapping[str, Any]], cpu: CpuTime, *, num_warmup: int) -> Timing:
    """Means over the steps after the first `num_warmup`, which is at least 1.

    Args:
        steps: metrics of a run, from its first step on.
    """
    measured = steps[num_warmup:]
    since_start = [step["seconds_since_start"] for step in steps]
    return Timing(
        num_steps=len(measured),
        wall_s=(since_start[-1] - since_start[num_warmup - 1]) / len(measured),
        phases_s={
            phase: sum(step[f"seconds_{phase}"] for step in measured) / len(measured) for phase in PHASES
        },
        cpu=cpu,
    )


def cpu_time(before: Mapping[int, Usage], after: Mapping[int, Usage], *, driver: int) -> CpuTime:
    """What processes took from one moment to another. Those that ended in between do not count.

    Args:
        before, after: by process id.
        driver: its process id.
    """
    took = {pid: usage.cpu_s - (before[pid].cpu_s if pid in before else 0.0) for pid, usage in after.items()}
    return CpuTime(
        driver_s=took[driver],
        queue_s=sum(took[pid] for pid, usage in after.items() if is_actor(usage, "ExperienceQueue")),
        all_s=sum(took.values()),
    )
