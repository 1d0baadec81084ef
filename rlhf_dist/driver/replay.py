"""Learner steps of a run done once more, from a checkpoint and the journal alone.

    checkpoint, or the starting policy ──► LearnerGroup ──► policy after each step: the one of the journal?
    samples of each step, read by the ranks ──►┘

No rollout worker, no scoring worker and no queue is started. The run's folder is only read, so a replay may
stand beside the run. With the run's own configuration every step must give the policy that the journal
recorded; with another one it shows what the same experience would have made of the policy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.experience_queue import LeasedBatch
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.placement import check_fits
from rlhf_dist.cluster.session import cpus_of_smallest_node, ray_session
from rlhf_dist.driver.export import discard_half_export, export_policy
from rlhf_dist.driver.flow import policy_digest
from rlhf_dist.driver.learner import start_learner
from rlhf_dist.driver.preparation import context_tokens, shares
from rlhf_dist.driver.replay_plan import Plan, deleted_meanwhile, make_plan
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.engines.loading import vocabulary_size
from rlhf_dist.errors import ConfigError, RunError
from rlhf_dist.experience.steps import LearnerStep
from rlhf_dist.observability.progress import Progress
from rlhf_dist.weights.certificate import probe_tokens

DIGEST_CHARACTERS = 12
"""Of a digest, in the table."""


@dataclass(frozen=True)
class ReplayedStep:
    """One learner step, as the journal has it and as it came out now."""

    step: int
    num_samples: int
    reward_mean: float
    policy_loss: float | None
    """None: only the value model was trained."""
    recorded_digest: str | None
    replayed_digest: str

    @property
    def same(self) -> bool:
        """Whether the parameters after the step are those of the run, bit for bit."""
        return self.recorded_digest == self.replayed_digest


@dataclass(frozen=True)
class Replay:
    """A replay that is over."""

    checkpoint: str | None
    """Name of the one that it went on from. None: it began with the starting policy."""
    first_step: int
    """The first step that was done, whether or not it was asked for."""
    steps: tuple[ReplayedStep, ...]
    """Those that were asked for."""
    changed: tuple[str, ...]
    """Overrides that explain other digests."""

    @property
    def same(self) -> bool:
        """Whether every step gave the recorded policy."""
        return all(step.same for step in self.steps)

    @property
    def as_expected(self) -> bool:
        """Whether nothing differs that should be the same."""
        return self.same or bool(self.changed)

    def as_json(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        steps = [asdict(step) | {"same": step.same} for step in self.steps]
        return asdict(self) | {"steps": steps, "same": self.same, "as_expected": self.as_expected}


def replay(
    run: Path,
    overrides: Sequence[str],
    *,
    from_step: int,
    to_step: int | None,
    out: Path | None,
    address: str | None,
    console: Console,
    verbose: bool,
) -> Replay:
    """Do the steps of a run again. No process is left, and no file but the policy in `out`.

    Args:
        run: its folder.
        overrides: `section.key=value`, over the run's own configuration.
        from_step, to_step: the steps, without `to_step`. None: to the last one that was trained.
        out: where the policy after the last step goes, as a Hugging Face folder with its tokenizer.
        console: for the progress.

    Raises:
        RunError: with one clear message.
    """
    disable_progress_bar()
    folder = RunFolder(run.absolute())
    if out is not None:
        out = out.absolute()
        check_out(out, folder.root)
    plan = make_plan(folder, overrides, from_step=from_step, to_step=to_step)
    try:
        with (
            Progress(console, num_steps=len(plan.steps)) as progress,
            ray_session(address, verbose=verbose),
            _learner(plan, progress) as (learner, events),
        ):
            steps = _replay_steps(plan, learner, events, progress)
            if out is not None:
                progress.phase("exporting the policy")
                export_policy(learner, events, out, tokenizer_of=plan.models.policy)
    finally:
        if out is not None:
            discard_half_export(out)
    return Replay(
        checkpoint=None if plan.checkpoint is None else plan.checkpoint.name,
        first_step=plan.steps[0].step,
        steps=steps,
        changed=plan.changed,
    )


def check_out(out: Path, run: Path) -> None:
    """Refuse a folder for the policy that would take something's place, or cannot be made.

    Raises:
        ConfigError: it lies in the run's folder, has something in it, or its parent cannot be written.
    """
    if out.resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"--out {out} lies in the run folder {run}, which is only read; name another one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; name a new one")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ConfigError(f"--out {out}: there is no folder {out.parent} that can be written; make it first")


# -------------------------------------------------------------------------------------------------- steps


@contextmanager
def _learner(plan: Plan, progress: Progress) -> Iterator[tuple[LearnerGroup, Events]]:
    """The learner group alone, as it was before the plan's first step; killed when the block ends."""
    cluster = plan.config.cluster
    share = shares(plan.config, node_cpus=cpus_of_smallest_node())["learner"]
    check_fits([share], ray.cluster_resources())
    start = "the starting policy" if plan.checkpoint is None else f"checkpoint {plan.checkpoint.name}"
    for damaged in plan.damaged:
        progress.say(str(damaged))
    progress.say(f"starting {share.num_workers} learner workers from {start}")
    progress.phase("starting workers")
    learner, events = LearnerGroup(share, cluster), Events()
    try:
        start_learner(learner, events, plan.config, plan.models, plan.journal)
        if plan.checkpoint is not None:
            _load(learner, events, plan.checkpoint)
        yield learner, events
    finally:
        learner.end()


def _load(learner: LearnerGroup, events: Events, checkpoint: Path) -> None:
    """Read a checkpoint that a run going on may delete meanwhile.

    Raises:
        RunError: it was deleted, or cannot be loaded.
    """
    try:
        learner.load(events, checkpoint)
    except RunError as error:
        if checkpoint.exists():
            raise
        raise deleted_meanwhile(checkpoint) from error


def _replay_steps(
    plan: Plan, learner: LearnerGroup, events: Events, progress: Progress
) -> tuple[ReplayedStep, ...]:
    """Do the plan's steps; what came of those that were asked for."""
    config, policy = plan.config, plan.models.policy
    probe = probe_tokens(vocabulary_size(policy), context_tokens(config, policy))
    done = []
    for recorded in plan.steps:
        step = recorded.step
        progress.phase(f"step {step}")
        batches = [LeasedBatch(rows, ref=[]) for rows in recorded.samples]
        temperature = config.rollout.sampling.temperature_at(step, config.run.num_steps)
        metrics = learner.step(events, batches, step, temperature)
        published = learner.publish(events, step + 1, probe)
        done.append(_replayed_step(recorded, metrics, policy_digest(published.manifest)))
        outcome = f"reward {metrics['reward_mean']:.3f}  {'the same' if done[-1].same else 'another'} policy"
        progress.advance(len(done), outcome)
        progress.say(f"step {step}  {outcome}")
    return tuple(step for step in done if step.step >= plan.from_step)


def _replayed_step(recorded: LearnerStep, metrics: dict[str, float], digest: str) -> ReplayedStep:
    return ReplayedStep(
        step=recorded.step,
        num_samples=int(metrics["num_samples"]),
        reward_mean=metrics["reward_mean"],
        policy_loss=metrics.get("policy_loss"),
        recorded_digest=recorded.policy_digest,
        replayed_digest=digest,
    )


# ------------------------------------------------------------------------------------------------- report


def print_replay(console: Console, found: Replay) -> None:
    """The steps in a table, and what to think of them."""
    table = Table()
    for name in ("step", "samples", "reward", "loss", "recorded policy", "replayed policy", "same"):
        table.add_column(name, justify="left" if "policy" in name else "right")
    for step in found.steps:
        table.add_row(
            str(step.step),
            str(step.num_samples),
            f"{step.reward_mean:.4f}",
            "-" if step.policy_loss is None else f"{step.policy_loss:.4f}",
            (step.recorded_digest or "-")[:DIGEST_CHARACTERS],
            step.replayed_digest[:DIGEST_CHARACTERS],
            "yes" if step.same else "no",
            style=None if step.same or found.changed else "bold red",
        )
    console.print(table)
    console.print(verdict(found), style=None if found.as_expected else "bold red", highlight=False)


def verdict(found: Replay) -> str:
    """The replay in one sentence."""
    differing = [step.step for step in found.steps if not step.same]
    changes = ", ".join(found.changed)
    if not differing:
        also = f", also with {changes}" if found.changed else ""
        return f"every step gave the policy that the run had, bit for bit{also}"
    if found.changed:
        return (
            f"{len(differing)} of {len(found.steps)} steps gave another policy than the run had, as is to be "
            f"expected with {changes} from step {found.first_step} on"
        )
    return (
        f"step {differing[0]} is the first that gave another policy than the run had; the reason can be a "
        "folder that was changed, other software, another number of threads (learner.threads_per_worker, "
        "which follows from the machine where it is not set), settings that were changed when the run was "
        "resumed, or a GPU"
    )
