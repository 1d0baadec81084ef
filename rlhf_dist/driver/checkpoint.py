"""Checkpoints: written beside, synced, renamed; the old ones go only afterwards."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.driver.run_folder import write_json
from rlhf_dist.errors import ConfigError

PREFIX = "step-"


@dataclass(frozen=True)
class RunState:
    """Where a run stands between two steps, besides the learner's own state."""

    next_step: int
    num_ranks: int
    zero_stage: int


def save_checkpoint(folder: Path, learner: LearnerGroup, state: RunState, *, keep_last: int) -> Path:
    """Write a checkpoint and remove those beyond `keep_last`."""
    final = folder / f"{PREFIX}{state.next_step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    write_json(temporary / "state.json", asdict(state))
    _sync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    whole = [path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").exists()]
    return sorted(whole, key=lambda path: (len(path.name), path.name))  # a million steps have seven digits


def read_state(checkpoint: Path, *, num_ranks: int, zero_stage: int) -> RunState:
    """The state beside a checkpoint.

    Raises:
        ConfigError: it was written by another number of ranks or another ZeRO stage.
    """
    state = RunState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    if (state.num_ranks, state.zero_stage) != (num_ranks, zero_stage):
        raise ConfigError(
            f"checkpoint {checkpoint} was written by {state.num_ranks} learner ranks with ZeRO stage "
            f"{state.zero_stage}; resume with learner.num_workers={state.num_ranks} "
            f"learner.zero_stage={state.zero_stage}"
        )
    return state


def _sync(folder: Path) -> None:
    for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
