"""Where a run goes on after a crash: its newest checkpoint whose files are what was written.

A damaged checkpoint is passed over for the one before; the journal has the steps since then. That may be the
copy of the best one, or without any whole one step 0, as long as the journal still has all steps since then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config import Config
from rlhf_dist.driver.checkpoint import check_state, find_damage, named_checkpoints, revive_best, step_of
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.errors import ConfigError, RunError
from rlhf_dist.experience.journal import JournalReader
from rlhf_dist.experience.steps import STEPS_FILE, LearnerStep, StepHistory, read_history
from rlhf_dist.observability.metrics import read_metrics


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that does not count."""

    checkpoint: Path
    reason: str

    def __str__(self) -> str:
        return f"checkpoint {self.checkpoint} is damaged ({self.reason}) and is passed over"


@dataclass(frozen=True)
class StartingPoint:
    """What the learner is loaded from, and the first step that it does then."""

    checkpoint: Path | None = None
    """None: the starting policy."""
    first_step: int = 0
    notes: tuple[str, ...] = ()
    """What the user should know of it, a line each."""


def starting_point(folder: RunFolder, config: Config) -> StartingPoint:
    """Where a run that was interrupted goes on, or its learner after it has died.

    Raises:
        ConfigError: the checkpoint was written by another algorithm, with other adapters, or after more steps
            than the run is to have.
        RunError: no checkpoint is whole, and the journal does not have all steps since step 0; or it has not
            recorded the steps before the checkpoint.
        StorageError: the copy of the best one has to be gone on from, and the disk is full.
    """
    history = read_history(folder.journal)
    checkpoint, damaged = newest_whole_checkpoint(folder.checkpoints)
    notes = [str(each) for each in damaged]
    if damaged and (best := _newer_best(folder, history, checkpoint)) is not None:
        checkpoint = revive_best(best)
        notes.append(f"the copy of the best checkpoint, {best.name}, is whole: the run goes on from it")
    if checkpoint is None:
        if damaged:
            _check_journal(folder, history, damaged)
            notes.append("no checkpoint is whole: all steps are done again, from the journal")
        _check_samples(folder, history, 0)
        return StartingPoint(notes=tuple(notes))
    _check_recorded(folder, history, checkpoint)
    state = check_state(checkpoint, config)
    if config.run.num_steps < state.next_step:
        raise ConfigError(
            f"run.num_steps={config.run.num_steps} is below the {state.next_step} steps that checkpoint "
            f"{checkpoint} has behind it; set run.num_steps={state.next_step} or more, or set run.dir to a "
            "new folder"
        )
    _check_samples(folder, history, state.next_step)
    num_ranks, zero_stage = config.learner.num_workers, config.learner.zero_stage
    if (state.num_ranks, state.zero_stage) != (num_ranks, zero_stage):
        notes.append(
            f"checkpoint {checkpoint.name} was written by {state.num_ranks} learner rank(s) with ZeRO stage "
            f"{state.zero_stage}, and {num_ranks} with stage {zero_stage} go on from it: the same state, but "
            "from here on sums are rounded in another order"
        )
    return StartingPoint(checkpoint, state.next_step, tuple(notes))


def newest_whole_checkpoint(
    folder: Path, *, at_most: int | None = None, with_best: bool = False
) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint whose files all have their digests, and the newer ones that are damaged.

    Args:
        folder: of the checkpoints.
        at_most: the last step that it may go on with; None: any.
        with_best: it may also be the copy of the best one, for which no journal may be left.
    """
    damaged: list[Damaged] = []
    for checkpoint in reversed(named_checkpoints(folder, with_best=with_best)):
        if at_most is not None and step_of(checkpoint) > at_most:
            continue
        try:
            reason = find_damage(checkpoint)
        except FileNotFoundError:
            continue
        if reason is None:
            return checkpoint, damaged
        damaged.append(Damaged(checkpoint, reason))
    return None, damaged


def reported_steps(folder: RunFolder) -> set[int]:
    """Steps that are done by what a run has written beside its journal: its metrics and its checkpoints.

    Raises:
        RunError: the metrics are broken.
    """
    checkpoints = named_checkpoints(folder.checkpoints, with_best=True)
    before_newest = range(step_of(checkpoints[-1]) if checkpoints else 0)
    return {metrics["step"] for metrics in read_metrics(folder.metrics)}.union(before_newest)


def has_samples(journal: JournalReader, step: LearnerStep) -> bool:
    """Whether a journal still has what a step was trained on."""
    return all(journal.holds(segment) for segment in {place.segment for place, _ in step.samples})


def _newer_best(folder: RunFolder, history: StepHistory, checkpoint: Path | None) -> Path | None:
    """The copy of the best checkpoint, where it is whole, is newer, and the journal has the steps since."""
    best, _ = newest_whole_checkpoint(folder.checkpoints, with_best=True)
    if best is None or best == checkpoint:
        return None
    return best if _missing_step(folder, history, step_of(best)) is None else None


def _missing_step(folder: RunFolder, history: StepHistory, first_step: int) -> int | None:
    """The first step from there on whose samples the journal does not have; None: it has them all."""
    journal = JournalReader(folder.journal)
    for step in range(first_step, max(history.steps, default=-1) + 1):
        if step not in history.steps or not has_samples(journal, history.steps[step]):
            return step
    return None


def _check_journal(folder: RunFolder, history: StepHistory, damaged: list[Damaged]) -> None:
    missing = _missing_step(folder, history, 0)
    if missing is not None:
        reasons = "; ".join(f"{each.checkpoint.name}: {each.reason}" for each in damaged)
        raise RunError(
            f"no checkpoint in {folder.checkpoints} is whole ({reasons}), and the journal no longer has "
            f"the samples of step {missing}, so that the run cannot start again from it; bring the files "
            "back from a copy, or start anew with --overwrite"
        )


def _check_recorded(folder: RunFolder, history: StepHistory, checkpoint: Path) -> None:
    """Without the record of earlier steps, their prompts would be trained again."""
    for step in range(step_of(checkpoint)):
        if step not in history.steps or not history.steps[step].trained:
            raise RunError(
                f"checkpoint {checkpoint} goes on with step {step_of(checkpoint)}, but "
                f"{folder.journal / STEPS_FILE} does not say that step {step} was trained: the journal was "
                "deleted, or is not that of this run; bring it back from a copy, or start anew with "
                "--overwrite"
            )


def _check_samples(folder: RunFolder, history: StepHistory, first_step: int) -> None:
    """What steps from there on have been given has to be whole: they are repeated with exactly that."""
    journal = JournalReader(folder.journal)
    for step in sorted(history.steps.keys() - range(first_step)):
        try:
            for place, _ in history.steps[step].samples:
                journal.read(place)
        except RunError as error:
            raise RunError(
                f"the samples of step {step}, which the run goes on with, are not all there: {error}; bring "
                f"{folder.journal} back from a copy, or start anew with --overwrite"
            ) from error
