"""What is done when a role is lost, while the others go on. Nobody has to look on.

    rollout worker   replaced, brought the newest weights, proved; its prompts are handed out again
    scoring worker   replaced; its batches are scored elsewhere
    queue            made anew from the journal; what was asked of it is asked again
    learner rank     the whole group is made anew, at the last checkpoint, and repeats the journal's steps

Losses are noticed by the calls that fail, by deadlines, and by heartbeats. A user's error (`RunError` of
another kind) is no loss: it ends the run. Each loss and each recovery is a line of `events.jsonl`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from rlhf_dist.cluster.calls import facts_of
from rlhf_dist.cluster.experience_queue import QUEUE, LeasedBatch
from rlhf_dist.cluster.liveness import Heartbeats
from rlhf_dist.cluster.restarts import RestartBudget
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import Config
from rlhf_dist.driver.checkpoint import step_of
from rlhf_dist.driver.flow import Flow, Roles, policy_digest
from rlhf_dist.driver.learner import start_learner
from rlhf_dist.driver.preparation import Models
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.driver.starting_point import newest_whole_checkpoint
from rlhf_dist.errors import (
    DataLostError,
    DeadlineError,
    LearnerLostError,
    ResourceError,
    RewardTimeoutError,
    RunError,
    WeightsError,
    WorkerError,
    WorkerLostError,
)
from rlhf_dist.experience.steps import read_history
from rlhf_dist.observability.run_events import RunEvents

Result = TypeVar("Result")
LEARNER = "learner"
"""Its ranks are lost and restored as one."""
ROOM_EVERY_S = 2.0
"""Between two looks whether the cluster has found another place for a worker whose node is gone."""
WORKER_FAULTS = (WorkerError, DeadlineError, RewardTimeoutError)
"""What a new worker may not meet again. Every other error is the user's to mend."""


@dataclass(frozen=True)
class Loss:
    """Something that was lost and is being replaced."""

    role: str
    worker: str
    since: float
    delay_s: float
    """Before the replacement is started."""
    counts: dict[str, int] = field(default_factory=dict)
    """What has to be done again for it, as `RunEvents.recovered` calls it."""

    @property
    def seconds(self) -> float:
        """Since it was noticed."""
        return time.monotonic() - self.since


class Recovery:
    """Starts every role, and starts again what is lost."""

    def __init__(
        self, config: Config, folder: RunFolder, models: Models, roles: Roles, flow: Flow, log: RunEvents
    ) -> None:
        self._config, self._folder, self._models = config, folder, models
        self._roles, self._flow, self._events, self._log = roles, flow, flow.events, log
        settings = config.recovery
        self._budgets: dict[str, RestartBudget] = {}  # of each worker that was lost; of the learner as one
        self._heartbeats = Heartbeats(
            flow.events, interval_s=settings.heartbeat_interval_s, timeout_s=settings.heartbeat_timeout_s
        )
        self._losses: defaultdict[str, list[Loss]] = defaultdict(list)  # of each worker, until it works again
        self._step = 0
        self._replacing_queue = False
        self._is_starting = False
        self._last_failure: tuple[int, str] | None = None
        self.is_restoring = False
        """Whether the learner is somewhere between the last checkpoint and the step under way."""
        roles.rollout.workers.on_failure = self._rollout_failed
        roles.scoring.workers.on_failure = self._scoring_failed
        roles.learner.workers.on_failure = self._rank_failed
        flow.queue.on_lost = self._queue_failed

    @property
    def step(self) -> int:
        """The learner step under way."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step > self._step:
            for budget in self._budgets.values():
                budget.progressed()
        self._step = self._log.step = step

    def start(self, first_step: int) -> None:
        """Start all workers side by side; they are ready when this returns, the learner at `first_step`."""
        self.step = first_step
        self._is_starting = True
        for index in range(len(self._roles.rollout)):
            self._start_rollout(index, lambda: None)
        for index in range(len(self._roles.scoring)):
            self._start_scoring(index, lambda: None)
        self._start_queue(self._flow.queue.release)
        try:
            self._start_learner(first_step, again=False)
        except LearnerLostError as error:
            self._restore_learner(error, first_step)
        self.survive(partial(self._events.wait_until, self._is_ready), next_step=first_step)
        self._is_starting = False

    def survive(self, work: Callable[[], Result], *, next_step: int) -> Result:
        """Do some work with the learner; where that is lost, bring it back to `next_step` and do it again."""
        while True:
            try:
                return work()
            except LearnerLostError as error:
                self._restore_learner(error, next_step)

    def _is_ready(self) -> bool:
        return self._flow.is_ready() and self._roles.scoring.is_ready() and not self._replacing_queue

    # -------------------------------------------------------------------------------------------- rollouts

    def _start_rollout(self, index: int, on_served: Callable[[], None]) -> None:
        pool = self._roles.rollout

        def started() -> None:
            pool.workers.watch(self._heartbeats, index)
            self._flow.join(index, on_served)

        pool.start(self._events, index, started)

    def _rollout_failed(self, index: int, error: RunError) -> None:
        workers = self._roles.rollout.workers
        life = workers.life(index)

        def learner_lives(_: None) -> None:
            if isinstance(error, WeightsError):
                raise error
            if workers.life(index) == life:
                self._rollout_lost(index, error)

        self._refuse_to_start_again(error)
        if isinstance(error, WeightsError | DataLostError):
            self._ask_learner(learner_lives)
        else:
            self._rollout_lost(index, error)

    def _rollout_lost(self, index: int, error: RunError) -> None:
        pool = self._roles.rollout
        name = pool.workers.name(index)
        loss = self._lost("rollout", name, error)
        pool.dismiss(self._events, index)
        loss.counts["dispatched_again"] = len(self._flow.leave(index))
        timeout_s = self._config.cluster.score_timeout_s
        self._flow.queue.ask(
            partial(self._roles.queue.lost, name), lambda _: self._flow.hand_out(), timeout_s=timeout_s
        )

        def served() -> None:
            self._recovered(name, "replaced, and serves the newest weights")

        start = partial(self._start_rollout, index, served)
        self._replace(pool.workers, index, loss, start, is_any_left=self._flow.has_workers)

    def _ask_learner(self, it_lives: Callable[[None], None]) -> None:
        """Weights cannot be proved, or their bytes are gone. Where their learner is gone, that is the fault;
        where it lives, such weights end the run, and a worker that lost the bytes is replaced."""
        workers = self._roles.learner.workers
        workers.expect(
            self._events,
            0,
            "answer_heartbeat",
            action="answer a heartbeat",
            then=it_lives,
            timeout_s=self._config.recovery.heartbeat_timeout_s,
        )

    # --------------------------------------------------------------------------------------------- scoring

    def _start_scoring(self, index: int, on_started: Callable[[], None]) -> None:
        pool = self._roles.scoring

        def started() -> None:
            pool.workers.watch(self._heartbeats, index)
            on_started()

        pool.start(self._events, index, started)

    def _scoring_failed(self, index: int, error: RunError) -> None:
        self._refuse_to_start_again(error)
        pool = self._roles.scoring
        name = pool.workers.name(index)
        loss = self._lost("scoring", name, error, blames_a_sample=pool.is_busy(index))
        loss.counts["scored_again"] = pool.dismiss(self._events, index, error)

        def started() -> None:
            self._recovered(name, "replaced")

        start = partial(self._start_scoring, index, started)
        self._replace(pool.workers, index, loss, start, is_any_left=pool.has_workers)

    # ----------------------------------------------------------------------------------------------- queue

    def _start_queue(self, on_started: Callable[[], None]) -> None:
        self._replacing_queue = True

        def started(_: None) -> None:
            self._replacing_queue = False
            self._roles.queue.watch(self._heartbeats, self._queue_failed)
            on_started()

        self._events.expect(
            self._roles.queue.start(),
            started,
            self._config.cluster.start_timeout_s,
            on_failure=self._queue_failed,
        )

    def _queue_failed(self, error: RunError) -> None:
        loss = self._lost("queue", QUEUE, error)
        self._flow.queue.hold()
        self._roles.queue.replace(first_step=self._step)

        def started() -> None:
            self._flow.queue.release(before=self._flow.tell_what_is_under_way)
            self._recovered(QUEUE, "rebuilt from the journal")

        self._events.after(loss.delay_s, lambda: self._start_queue(started))

    # --------------------------------------------------------------------------------------------- learner

    def _rank_failed(self, _: int, error: RunError) -> None:
        """A rank does not answer its heartbeat; whatever the driver waits for, this goes before."""
        raise LearnerLostError(str(error)) from error

    def _restore_learner(self, error: LearnerLostError, next_step: int) -> None:
        """Bring the learner back to the state before `next_step`; a kill meanwhile begins it anew."""
        self.is_restoring = True
        while True:
            self._refuse_the_same_again(error, next_step)
            loss = self._lost("learner", _name_of(error), error, at=LEARNER)
            self._roles.learner.dismiss(self._events)
            self._flow.unpublish()
            self._events.sleep(loss.delay_s)
            try:
                loss.counts["replayed_steps"] = self._start_learner(next_step, again=True)
                digest = policy_digest(self._flow.publish(next_step).manifest)
            except LearnerLostError as another:
                error = another
                continue
            self._recovered(LEARNER, self._what_was_restored(next_step, digest))
            self.is_restoring = False
            return

    def _refuse_the_same_again(self, error: LearnerLostError, next_step: int) -> None:
        """An exception that comes again at the same step is a fault of the program, and no kill."""
        seen = (next_step, str(error))
        if isinstance(error.__cause__, WorkerLostError | DeadlineError):
            return
        if seen == self._last_failure:
            raise WorkerError(str(error)) from error
        self._last_failure = seen

    def _start_learner(self, next_step: int, *, again: bool) -> int:
        """Start the ranks at the newest checkpoint and repeat the journal's steps; returns how many."""
        learner = self._roles.learner
        if again:
            self._wait_for_room(learner.workers)
            learner.replace()
        start_learner(learner, self._events, self._config, self._models, self._folder.journal)
        for rank in range(len(learner.workers)):
            learner.workers.watch(self._heartbeats, rank)
        checkpoint, damaged = newest_whole_checkpoint(self._folder.checkpoints, at_most=next_step)
        for each in damaged:
            self._log.say(str(each))
        first_step = 0
        if checkpoint is not None:
            learner.load(self._events, checkpoint)
            first_step = step_of(checkpoint)
        history = read_history(self._folder.journal) if first_step < next_step else None
        for step in range(first_step, next_step):
            assert history is not None
            batches = [LeasedBatch(rows, []) for rows in history.steps[step].samples]
            sampling, num_steps = self._config.rollout.sampling, self._config.run.num_steps
            learner.step(self._events, batches, step, sampling.temperature_at(step, num_steps))
        return next_step - first_step

    def _what_was_restored(self, next_step: int, digest: str) -> str:
        recorded = read_history(self._folder.journal).steps.get(next_step - 1)
        if recorded is None or recorded.policy_digest is None:
            return "started again"
        same = "the same policy" if recorded.policy_digest == digest else "another policy than before"
        return f"started again from the last checkpoint and the journal, with {same}"

    def _wait_for_room(self, workers: Workers) -> None:
        """Raises ResourceError where the cluster finds no place for the ranks in time."""
        timeout_s = self._config.cluster.placement_timeout_s
        deadline = time.monotonic() + timeout_s
        while not all(workers.has_room(rank) for rank in range(len(workers))):
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"a node with learner ranks is gone, and the cluster found no place for them in "
                    f"{timeout_s:g} s (cluster.placement_timeout_s); add a node, then go on with --resume"
                )
            self._events.sleep(ROOM_EVERY_S)

    # ------------------------------------------------------------------------------------------------ all

    def _refuse_to_start_again(self, error: RunError) -> None:
        """An exception before the run has begun is a fault of the settings or the machine, and no kill."""
        if self._is_starting and type(error) is WorkerError:
            raise error

    def _lost(
        self,
        role: str,
        worker: str,
        error: RunError,
        *,
        at: str | None = None,
        blames_a_sample: bool = False,
    ) -> Loss:
        """Write a loss down.

        Args:
            at: under which name it is made good, where that is not the worker's.
            blames_a_sample: its attempts count, and the worker's restarts do not.

        Raises:
            RunError: it is the user's to mend, or the worker was started again too often.
        """
        if not isinstance(error, WORKER_FAULTS):
            raise error
        self._log.lost(role, worker, _how_noticed(error), facts_of(error))
        name = at or worker
        delay_s = 0.0 if blames_a_sample else self._budget(name).spend(worker, error)
        loss = Loss(role, worker, time.monotonic(), delay_s)
        self._losses[name].append(loss)
        return loss

    def _budget(self, name: str) -> RestartBudget:
        return self._budgets.setdefault(name, RestartBudget(self._config.recovery, name))

    def _recovered(self, name: str, action: str) -> None:
        """Write down that what was lost under this name works, once for every time."""
        for loss in self._losses.pop(name):
            self._log.recovered(loss.role, loss.worker, action, loss.seconds, **loss.counts)

    def _replace(
        self,
        workers: Workers,
        index: int,
        loss: Loss,
        start: Callable[[], None],
        *,
        is_any_left: Callable[[], bool],
    ) -> None:
        """Create a dismissed worker anew once the cluster has room; the others go on meanwhile.

        Where no other is left, and while the run starts, which waits for every one, the cluster has
        `cluster.placement_timeout_s` to find it.
        """
        timeout_s = self._config.cluster.placement_timeout_s
        waited_for_since = time.monotonic() + loss.delay_s

        def try_it() -> None:
            nonlocal waited_for_since
            if workers.has_room(index):
                workers.replace(index)
                start()
                return
            if is_any_left() and not self._is_starting:
                waited_for_since = time.monotonic()
            elif time.monotonic() > waited_for_since + timeout_s:
                why = (
                    "a run starts with all of its workers" if is_any_left() else "its role has no other left"
                )
                raise ResourceError(
                    f"{loss.worker} is gone with its node, and the cluster found no place for it in "
                    f"{timeout_s:g} s (cluster.placement_timeout_s); {why}: add a node, then go on with "
                    "--resume"
                )
            self._events.after(ROOM_EVERY_S, try_it)

        self._events.after(loss.delay_s, try_it)


def _how_noticed(error: BaseException) -> str:
    if isinstance(error, LearnerLostError) and error.__cause__ is not None:
        return _how_noticed(error.__cause__)
    if isinstance(error, WorkerLostError):
        return "its process is gone"
    if isinstance(error, RewardTimeoutError):
        return "a reward did not return in time"
    if isinstance(error, DeadlineError):
        return "it did not answer in time"
    return "it failed"


def _name_of(error: LearnerLostError) -> str:
    """The rank that was lost, as messages begin: `learner worker 1`."""
    return " ".join(str(error).split()[:3])
