"""What a replay of learner steps needs, found and checked before a worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.config import ClusterSettings, Config, load_config
from rlhf_dist.data.sources import TASK_PREFIX
from rlhf_dist.driver.checkpoint import check_state, list_checkpoints, step_of
from rlhf_dist.driver.preparation import Models, check_trust_region, role_models
from rlhf_dist.driver.resumption import check_reference
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.driver.starting_point import Damaged, has_samples, newest_whole_checkpoint
from rlhf_dist.engines.loading import check_checkpoint
from rlhf_dist.errors import ConfigError, DataError, ModelError, RunError
from rlhf_dist.experience.journal import JournalReader, open_journal
from rlhf_dist.experience.steps import LearnerStep, StepHistory, read_history

REACHING = (
    "learner",
    "algorithm",
    "value",
    "cluster",
    "run.seed",
    "run.num_steps",
    "rollout.sampling.temperature",
    "rollout.sampling.temperature_final",
)
"""Keys and sections that reach the learner, or the waits for it. All others have done their work: what they
decided is in the journal."""
FROM_THE_START = "replay with --from-step 0, which needs no checkpoint"
"""What to do where an override changes what a checkpoint fixes."""


@dataclass(frozen=True)
class Plan:
    """What a replay does, decided before a worker starts."""

    config: Config
    models: Models
    journal: Path
    checkpoint: Path | None
    """What the learner goes on from. None: the starting policy."""
    steps: tuple[LearnerStep, ...]
    """From the checkpoint on, each with the journal's places of its samples."""
    from_step: int
    """The first step that was asked for; those before only lead there."""
    changed: tuple[str, ...]
    """The overrides, where they change what the learner computes."""
    damaged: tuple[Damaged, ...]
    """Checkpoints that would have been nearer."""


def make_plan(folder: RunFolder, overrides: Sequence[str], *, from_step: int, to_step: int | None) -> Plan:
    """Find what the steps need, and check all that can be checked without a worker.

    Raises:
        RunError: naming what is missing or does not fit.
    """
    folder.check_journal()
    journal = open_journal(folder.root)
    recorded, config = load_config(folder.config), load_config(folder.config, overrides)
    _check_overrides(recorded, overrides)
    history = read_history(journal.folder)
    asked = chosen_steps(history, folder.root, from_step=from_step, to_step=to_step)
    checkpoint, damaged = newest_whole_checkpoint(folder.checkpoints, at_most=asked.start, with_best=True)
    first_step = 0 if checkpoint is None else step_of(checkpoint)
    steps = tuple(history.steps[step] for step in range(first_step, asked.stop))
    starts = [0, *map(step_of, list_checkpoints(folder.checkpoints, with_best=True))]
    _check_samples(journal, steps, history, starts)
    models = role_models(config, starting_policy(config, folder))
    _check_learner(config, recorded, models)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, config)
    return Plan(
        config=config,
        models=models,
        journal=journal.folder,
        checkpoint=checkpoint,
        steps=steps,
        from_step=asked.start,
        changed=tuple(overrides) if _deciding(config) != _deciding(recorded) else (),
        damaged=tuple(damaged),
    )


def deleted_meanwhile(checkpoint: Path) -> RunError:
    """Of a checkpoint that was there just now."""
    return RunError(
        f"checkpoint {checkpoint} was deleted while it was to be read: the run goes on, and keeps the last "
        "checkpoint.keep_last ones; start the replay again, from a later step"
    )


def chosen_steps(history: StepHistory, run: Path, *, from_step: int, to_step: int | None) -> range:
    """The steps that are asked for. `to_step` is not one of them; None: all that were trained.

    Raises:
        ConfigError: there are none, or the journal does not have all of them.
    """
    if to_step is not None and from_step >= to_step:
        raise ConfigError(
            f"--from-step {from_step} --to-step {to_step} leaves no step to replay: --to-step itself is not "
            "replayed; raise it"
        )
    trained = [step.step for step in history.steps.values() if step.trained]
    if not trained:
        raise ConfigError(f"the journal of run {run} has no trained step yet; there is nothing to replay")
    end = max(trained) + 1
    asked = range(from_step, max(end, from_step + 1) if to_step is None else to_step)
    if asked.stop > end:
        wanted = f"all of {asked.start} to {asked.stop - 1}" if len(asked) > 1 else f"step {asked.start}"
        limits = [f"--from-step can be {end - 1} at most"] if from_step >= end else []
        if to_step is not None:
            limits.append(f"--to-step can be {end} at most")
        raise ConfigError(
            f"the journal of run {run} has the trained steps {min(trained)} to {max(trained)}, and not "
            f"{wanted}; {', '.join(limits)}"
        )
    return asked


def starting_policy(config: Config, folder: RunFolder) -> str:
    """The policy that reinforcement learning started from.

    Raises:
        ModelError: the run's folder does not have it any more.
    """
    if config.sft is not None:
        made = folder.sft_policy
    elif config.policy.model.startswith(TASK_PREFIX):
        made = folder.initial_policy
    else:
        return config.policy.model
    if not (made / "config.json").exists():
        raise ModelError(
            f"the starting policy {made} is gone; without it no step can be replayed, since the weights "
            "before the first checkpoint and the shape of every model are from there"
        )
    return str(made)


def _check_overrides(recorded: Config, overrides: Sequence[str]) -> None:
    """Refuse what would have no effect.

    Raises:
        ConfigError: naming what may be changed.
    """
    reaching = (*REACHING, "policy") if recorded.sft is None else REACHING
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == each or key.startswith(f"{each}.") for each in reaching):
            raise ConfigError(
                f"override {override!r}: {key} does not reach the learner, and its part in the experience is "
                f"in the journal; a replay takes {', '.join(reaching)}"
            )


def _check_samples(
    journal: JournalReader, steps: Sequence[LearnerStep], history: StepHistory, starts: Sequence[int]
) -> None:
    """Raises DataError where samples are gone, saying how, and naming the first step that is left."""
    gone = [step for step in steps if not has_samples(journal, step)]
    if not gone:
        return
    trained = [step for step in history.steps.values() if step.trained]
    last_gone = max(step.step for step in trained if not has_samples(journal, step))
    later = [start for start in starts if last_gone < start <= max(step.step for step in trained)]
    remedy = f"--from-step {min(later)} and later are there" if later else "no later step has a checkpoint"
    raise DataError(
        f"the samples of step {gone[0].step} are no longer in journal {journal.folder}: "
        f"{_how_lost(journal, gone[0])}; {remedy}"
    )


def _how_lost(journal: JournalReader, step: LearnerStep) -> str:
    """What became of the samples of a step that a journal does not have."""
    deleted = journal.deleted_segments()
    segments = {place.segment for place, _ in step.samples if not journal.holds(place.segment)}
    if segments <= deleted:
        return "they were deleted to keep it small (experience.journal.max_gib)"
    lost = min(segments - deleted)
    return f"it has lost segment {lost}, and `rlhf-dist inspect {journal.folder.parent}` says what else"


def _check_learner(config: Config, recorded: Config, models: Models) -> None:
    """Raises RunError where a model is gone, or the algorithm needs what the journal has not."""
    check_trust_region(config)
    check_checkpoint(models.policy, "policy")
    if models.value is not None:
        check_checkpoint(models.value, "value")
    check_reference(config, recorded)


def _check_checkpoint(checkpoint: Path, config: Config) -> None:
    """Raises ConfigError where the learner could not go on from a checkpoint."""
    try:
        check_state(checkpoint, config, otherwise=FROM_THE_START)
    except FileNotFoundError as error:
        raise deleted_meanwhile(checkpoint) from error


def _deciding(config: Config) -> Config:
    """The configuration without what has no say in the numbers of a learner step."""
    learner = config.learner.model_copy(update={"cpus_per_worker": None})
    return config.model_copy(update={"learner": learner, "cluster": ClusterSettings()})
