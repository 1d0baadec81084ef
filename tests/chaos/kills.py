"""What is killed, how and when: a schedule that follows from a seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Role = Literal["rollout", "scoring", "queue", "learner", "driver", "machine"]
Blow = Literal["SIGKILL", "SIGSTOP", "SIGTERM"]

TITLES: dict[Role, str] = {
    "rollout": "ray::RolloutWorker",
    "scoring": "ray::ScoringWorker",
    "queue": "ray::ExperienceQueue",
    "learner": "ray::LearnerWorker",
}
"""Of the processes of each role that the driver replaces."""
BLOWS: dict[Role, tuple[Blow, ...]] = {
    "rollout": ("SIGKILL", "SIGKILL", "SIGSTOP"),
    "scoring": ("SIGKILL", "SIGKILL", "SIGSTOP"),
    "queue": ("SIGKILL", "SIGKILL", "SIGSTOP"),
    "learner": ("SIGKILL", "SIGKILL", "SIGSTOP"),
    "driver": ("SIGKILL", "SIGTERM"),
    "machine": ("SIGKILL",),
}
METHODS: dict[Role, tuple[str | None, ...]] = {
    "rollout": (None, "generate", "load_weights"),
    "scoring": (None, "score"),
    "queue": (None, "lease", "put", "acknowledge"),
    "learner": (None, "step", "publish", "save"),
    "driver": (None,),
    "machine": (None,),
}
"""What a role's process title shows while it is busy; None: at any moment."""
LONGEST_DELAY_S = 2.0
SHARE_DURING_RECOVERY = 0.3
SHARE_OF_WHOLE_ROLES = 0.2


@dataclass(frozen=True)
class Kill:
    """One blow. What it waits for comes in this order: steps, the recovery, the method, the delay."""

    role: Role
    blow: Blow
    worker: int | None
    """Which of the role's living processes, modulo their number, by process id. None: all of them at once."""
    after_steps: int
    """Lines of `metrics.jsonl`."""
    during_recovery: bool
    """Only when another loss was noticed since the last blow."""
    method: str | None
    """Shown by the victim's title."""
    delay_s: float

    @property
    def ends_the_run(self) -> bool:
        """Whether the same command has to be started again."""
        return self.role not in TITLES

    def __str__(self) -> str:
        """As in `SIGKILL learner 1 after step 3 in save + 0.21 s`."""
        moment = [f"after step {self.after_steps}"]
        moment += ["during a recovery"] if self.during_recovery else []
        moment += [f"in {self.method}"] if self.method else []
        which = "all" if self.worker is None else self.worker
        return f"{self.blow} {self.role} {which} {' '.join(moment)} + {self.delay_s:.2f} s"

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def make_schedule(
    seed: int, *, num_steps: int, num_kills: int, roles: Sequence[Role] = tuple(METHODS)
) -> tuple[Kill, ...]:
    """Kills in the order in which they come, spread over a run of `num_steps` steps.

    Every role gets its turn before one gets a second. A kill during a recovery comes right after one that the
    driver survives, so that there is a recovery.
    """
    dice = random.Random(seed)
    chosen: list[Role] = []
    while len(chosen) < num_kills:
        chosen += dice.sample(roles, len(roles))
    steps = sorted(dice.randrange(1, num_steps - 1) for _ in range(num_kills))
    kills: list[Kill] = []
    for role, after_steps in zip(chosen, steps, strict=False):
        can_follow = bool(kills) and not kills[-1].ends_the_run
        during_recovery = can_follow and dice.random() < SHARE_DURING_RECOVERY
        kills.append(
            Kill(
                role=role,
                blow=dice.choice(BLOWS[role]),
                worker=None if dice.random() < SHARE_OF_WHOLE_ROLES else dice.randrange(2),
                after_steps=kills[-1].after_steps if during_recovery else after_steps,
                during_recovery=during_recovery,
                method=None if during_recovery else dice.choice(METHODS[role]),
                delay_s=round(dice.uniform(0, LONGEST_DELAY_S), 2),
            )
        )
    return tuple(kills)
