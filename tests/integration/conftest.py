"""A run that several files of tests look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SPY = Path(__file__).with_name("driver_spy.py")
STEP_BY_STEP = (
    "algorithm.kl.target=6",
    "algorithm.kl.horizon=100",
    "learner.policy_optimizer.schedule=cosine",
    "rollout.sampling.temperature_final=0.8",
)
"""The KL's coefficient, the learning rate and the temperature are others in every step."""


@dataclass
class Recorded:
    """A finished run of steps 0 to 3, with checkpoints before step 2 and after the last."""

    run: Any
    seen_by_driver: Path
    """Report of `driver_spy.py`."""


@pytest.fixture(scope="session")
def recorded(train_once: Callable[..., Any], lean: tuple[str, ...], shared_folder: Path) -> Recorded:
    report = shared_folder / "seen-by-driver.json"
    shorter = [each for each in lean if not each.startswith("run.num_steps")]
    settings = (*shorter, *STEP_BY_STEP, "run.num_steps=4", "checkpoint.every_steps=2")
    run = train_once("recorded", *settings, launcher=(str(SPY), str(report)))
    assert run.returncode == 0, run.output
    return Recorded(run, report)
