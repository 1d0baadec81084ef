"""What is kept of the steps that are done: a line of metrics for each, and checkpoints when they are due."""

from __future__ import annotations

from functools import partial

from rlhf_dist.config import Config
from rlhf_dist.driver.checkpoint import list_checkpoints, save_checkpoint, state_before, step_of, why_no_score
from rlhf_dist.driver.flow import Flow, Roles
from rlhf_dist.driver.recovery import Recovery
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.errors import RunError, TerminatedError
from rlhf_dist.observability.metrics import Metrics, MetricsLog
from rlhf_dist.observability.progress import Progress
from rlhf_dist.observability.run_events import RunEvents
from rlhf_dist.observability.stopwatch import Stopwatch

COMPACTION_TIMEOUT_S = 24 * 3600
"""For the journal to be compacted. Nobody waits for it."""


class StepRecords:
    """Writes them down, from a run's first step on."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        roles: Roles,
        flow: Flow,
        recovery: Recovery,
        stopwatch: Stopwatch,
        progress: Progress,
        *,
        first_step: int,
    ) -> None:
        self._config, self._folder, self._progress = config, folder, progress
        self._roles, self._flow, self._recovery = roles, flow, recovery
        self._stopwatch = stopwatch
        self._log = MetricsLog(folder.metrics, first_step=first_step)
        self._unsaved: Metrics | None = None  # of the step that was done last, where no checkpoint holds it
        if missing := self._log.missing_steps:
            progress.say(
                f"{folder.metrics} has lost {len(missing)} of the {first_step} steps before step "
                f"{first_step}, the first of them step {missing[0]}; the report goes without them"
            )

    def step_done(self, metrics: Metrics) -> None:
        """Log a step, show it, and save the state after it if that is due."""
        self._log.append(metrics)
        self._unsaved = metrics
        self._progress.step_done(metrics)
        next_step = metrics["step"] + 1
        if next_step % self._config.checkpoint.every_steps == 0 or next_step == self._config.run.num_steps:
            with self._stopwatch.phase("checkpoint"):
                self._recovery.survive(self._save, next_step=next_step)

    def last_checkpoint(self, log: RunEvents) -> TerminatedError:
        """Save where the run was told to end; what to tell the user."""
        if self._recovery.is_restoring:
            return TerminatedError(
                "terminated while the learner was being restored; --resume goes on from the journal"
            )
        try:
            self._save()
        except RunError as error:
            return TerminatedError(f"terminated; no last checkpoint could be written ({error})")
        found = list_checkpoints(self._folder.checkpoints)
        checkpoints = [each for each in found if step_of(each) == self._recovery.step]
        if not checkpoints:
            return TerminatedError("terminated before the first step was done; --resume begins again")
        log.terminated(checkpoints[-1])
        name = checkpoints[-1].name
        return TerminatedError(f"terminated; checkpoint {name} is written, --resume goes on from it")

    def _save(self) -> None:
        """Unless there is one, write a checkpoint, and let the journal forget what no checkpoint needs."""
        if self._unsaved is None:
            return
        state = state_before(self._unsaved["step"] + 1, self._config, self._unsaved)
        if (note := why_no_score(state, self._config, self._unsaved)) is not None:
            self._progress.say(note)
        save = partial(self._roles.learner.save, self._flow.events)
        save_checkpoint(self._folder.checkpoints, save, state, self._config.checkpoint)
        oldest = step_of(list_checkpoints(self._folder.checkpoints)[0])
        self._flow.queue.ask(
            partial(self._roles.queue.checkpointed, oldest), self._compacted, timeout_s=COMPACTION_TIMEOUT_S
        )
        self._unsaved = None

    def _compacted(self, problem: str | None) -> None:
        if problem is not None:
            self._progress.say(problem)
