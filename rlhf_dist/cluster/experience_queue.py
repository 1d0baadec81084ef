"""The bounded queue between scoring and the learner, and the ledger of all prompts.

It holds references and counts, never the experience itself: batches stay in the object store until no lease
needs them any more, and in the journal for longer. A full queue makes the producer wait; nothing is dropped
without a reason and a count. What the ledger decides is in the log of steps before anybody learns of it.
Prompts that are given up go to the dead letters first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import OnFailure
from rlhf_dist.cluster.liveness import Heartbeats, Worker, actor_class_of
from rlhf_dist.errors import RewardError, RunError, WorkerError
from rlhf_dist.experience.compaction import compact
from rlhf_dist.experience.dead_letter import DeadLetters
from rlhf_dist.experience.dispatch import WorkerLoad, assign
from rlhf_dist.experience.journal import JournalReader
from rlhf_dist.experience.ledger import Failure, Ledger
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.settings import GIB
from rlhf_dist.types import BatchInfo, BatchPlace, BatchRows, PromptAttempt, ServedVersion

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.data.prompts import PromptOrder

QUEUE = "experience queue"
ORPHANS_DEADLINE_S = 60
"""For the queue of a run whose driver was killed to be gone, and to let go of the journal."""


@dataclass(frozen=True)
class LeasedBatch:
    """Rows of one batch on loan to a learner step."""

    rows: BatchRows
    ref: list[ray.ObjectRef]
    """The batch in the object store, wrapped so that only the reference travels; empty where it is in the
    journal alone."""


@dataclass(frozen=True)
class Lease:
    """What a learner step is trained on. It is the step's until it is acknowledged."""

    step: int
    lease_id: int
    batches: list[LeasedBatch]
    num_samples: int
    oldest_version: int
    life: int
    """Of the queue actor that made it; the one in its place leases the step anew."""


class ExperienceQueue(Worker):
    """An asyncio actor: a waiting `put` or `lease` blocks nobody else."""

    def __init__(
        self,
        settings: ExperienceSettings,
        journal: Path,
        *,
        first_step: int,
        num_steps: int,
        prompts_per_step: int,
        samples_per_prompt: int,
        in_order: bool,
        prompts: pa.Table,
        order: PromptOrder,
        life: int = 0,
    ) -> None:
        """Take note of what `start` will go on with.

        Args:
            first_step: the one that the learner does next.
            num_steps: of the run: no prompt of a later step is handed out.
            in_order: every step gets the next ordinals in ascending order, whichever was finished first.
            prompts: the data set, tokenized; shared memory of the node.
            order: which row of it an ordinal means.
            life: how many actors of this run's queue died before this one.
        """
        self._settings, self._journal, self._life = settings, journal, life
        self._first_step = first_step
        self._num_steps, self._in_order = num_steps, in_order
        self._prompts_per_step, self._samples_per_prompt = prompts_per_step, samples_per_prompt
        self._prompts, self._order = prompts, order
        self._held: dict[BatchPlace, tuple[ray.ObjectRef, BatchInfo]] = {}
        self._num_samples = self._num_bytes = self._num_waiting_leases = 0
        self._changed = asyncio.Condition()
        self._compacting = asyncio.Lock()

    async def start(self) -> None:
        """Go on from what the journal says.

        Raises:
            RunError: another process writes it.
        """
        self._log = StepsLog(self._journal, wait_s=ORPHANS_DEADLINE_S)
        self._dead_letters = DeadLetters(self._journal, wait_s=ORPHANS_DEADLINE_S)
        self._ledger = Ledger.from_journal(
            JournalReader(self._journal),
            self._settings,
            samples_per_prompt=self._samples_per_prompt,
            first_step=self._first_step,
        )
        self._log.append(self._ledger.take_records())

    async def dispatch(self, loads: Sequence[WorkerLoad], version: int) -> dict[int, list[PromptAttempt]]:
        """Hand out what may be generated now, by worker; nothing where no prompt or no room is left.

        So many prompts are under way that each one is trained before its oldest token is too old.

        Args:
            version: the oldest policy version that a worker serves.
        """
        room = sum(load.room for load in loads)
        limit = self._ledger.dispatchable(self._prompts_per_step, version=version, num_steps=self._num_steps)
        ordinals = self._ledger.next_waiting(min(room, limit))
        handed_out: dict[int, list[PromptAttempt]] = {}
        for index, mine in assign(ordinals, loads).items():
            dispatched = self._ledger.dispatch(mine, version=version, worker=f"rollout worker {index}")
            handed_out[index] = [PromptAttempt(*each) for each in dispatched]
        self._write()
        return handed_out

    async def adopt(self, attempts: Sequence[PromptAttempt], version: int, worker: str) -> list[int]:
        """Learn, after the queue before this one died, what a worker still works on; see `Ledger.adopt`.

        Returns:
            Those ordinals that need not go on.
        """
        async with self._changed:
            needless = self._ledger.adopt(attempts, version=version, worker=worker)
            self._write()
            self._changed.notify_all()
            return needless

    async def lost(self, worker: str) -> int:
        """A worker is gone. Returns how many prompts wait again for that, or were given up.

        Raises:
            WorkerError: too many prompts were given up.
        """
        async with self._changed:
            num_in_flight = self._ledger.counts().in_flight
            failures = self._ledger.lost(worker)
            self._bury(failures)
            self._changed.notify_all()
            self._check_failed(failures, WorkerError)
            return num_in_flight - self._ledger.counts().in_flight

    async def samples_lost(self, lost: Sequence[tuple[PromptAttempt, str]]) -> None:
        """Rollouts are gone before they were scored, each for a reason: their prompts wait again.

        Raises:
            WorkerError: too many prompts were given up.
        """
        async with self._changed:
            ended = [self._ledger.failed_attempt(each.ordinal, each.attempt, reason) for each, reason in lost]
            failures = [failure for failure in ended if failure is not None]
            self._bury(failures)
            self._changed.notify_all()
            self._check_failed(failures, WorkerError)

    async def give_up(self, failures: Sequence[tuple[int, tuple[str, ...]]]) -> None:
        """Give prompts up, each with its reasons; nothing changes for those that are decided already.

        Raises:
            RewardError: too many prompts were given up.
        """
        async with self._changed:
            given_up = [self._ledger.give_up(ordinal, reasons) for ordinal, reasons in failures]
            known = [failure for failure in given_up if failure is not None]
            self._bury(known)
            self._changed.notify_all()
            self._check_failed(known, RewardError)

    async def put(self, batch: list[ray.ObjectRef], info: BatchInfo) -> None:
        """Add one scored batch, wrapped in a list so that only its reference travels; waits for room.

        One that was put before, to this queue or to the one that died before it, changes nothing.

        Raises:
            RunError: room will never be there, since the learner waits for this very batch.
        """
        assert info.place is not None
        async with self._changed:
            await self._changed.wait_for(
                lambda: info.place in self._held or self._has_room(info) or self._is_stuck()
            )
            if info.place in self._held:
                return
            if not self._has_room(info):
                raise RunError(
                    f"the experience queue holds {self._num_samples} samples, {self._num_bytes:,} bytes, and "
                    "the samples of a learner step do not fit; raise experience.max_gib or max_samples"
                )
            self._hold(info.place, batch[0], info)
            self._ledger.scored(info)
            self._write()
            self._changed.notify_all()

    async def lease(self, step: int) -> Lease:
        """The samples of a learner step; waits until they are there."""
        async with self._changed:
            self._num_waiting_leases += 1
            self._changed.notify_all()
            try:
                while (found := self._try_lease(step)) is None:
                    await self._changed.wait()
            finally:
                self._num_waiting_leases -= 1
            return found

    async def acknowledge(self, lease: Lease, policy_digest: str) -> int:
        """The learner has trained on a lease: forget its batches.

        A lease that has expired, as while the learner recovered, counts all the same: leased anew, its step
        has the same samples.

        Returns:
            How many prompts were given up of those before the step's last one.

        Raises:
            RunError: the lease had expired, and the step cannot be leased anew.
        """
        async with self._changed:
            self._ledger.expire(time.monotonic())
            is_ours = lease.life == self._life  # else made by the actor before, which died
            if not (is_ours and self._ledger.acknowledge(lease.lease_id, policy_digest)):
                self._acknowledge_anew(lease.step, policy_digest)
            self._write()
            self._changed.notify_all()
            return self._ledger.num_failed_before(lease.step)

    async def checkpointed(self, first_step: int) -> str | None:
        """No step before `first_step` will be repeated: the journal may be compacted up to there.

        Returns:
            What could not be compacted and why, in a sentence for the user.
        """
        self._ledger.forget_before(first_step)
        done = self._ledger.done_ordinals()
        max_bytes = self._settings.journal.max_bytes
        async with self._compacting:  # the driver does not wait for one before it asks for the next
            compaction = await asyncio.to_thread(compact, self._journal, done, max_bytes=max_bytes)
        return compaction.problem

    async def served(self, proofs: Sequence[ServedVersion]) -> None:
        """Write down which versions were proved, by whom."""
        self._log.append(
            {
                "event": "served",
                "worker": proof.worker,
                "version": proof.version,
                "max_abs_difference": proof.max_abs_difference,
                "proved_at_us": proof.proved_at_us,
            }
            for proof in proofs
        )

    def _bury(self, failures: Sequence[Failure]) -> None:
        """Write prompts that were given up to the dead letters, and then what the ledger decided."""
        for ordinal, reasons in failures:
            row = self._order.row_of(ordinal)
            self._dead_letters.append(ordinal, reasons, row=row, prompts=self._prompts)
        self._write()

    def _check_failed(self, failures: Sequence[Failure], error_class: type[RunError]) -> None:
        """Raises `error_class`: with these, more prompts were given up than may be."""
        num_failed, num_prompts = self._ledger.counts().failed, self._ledger.counts().total
        share = self._settings.max_failed_share
        if not failures or num_failed <= (max(1, share * num_prompts) if share > 0 else 0):
            return
        last = failures[-1]
        raise error_class(
            f"prompts given up: {num_failed} of {num_prompts} ({num_failed / num_prompts:.1%}), more than "
            f"experience.max_failed_share={share:g} allows; the last one was prompt {last.ordinal}: "
            f"{last.reasons[-1]}; all of them, with their reasons, are in {self._dead_letters.path}; mend "
            "the cause or raise experience.max_failed_share, then go on, without those prompts, with --resume"
        )

    def _try_lease(self, step: int) -> Lease | None:
        now = time.monotonic()
        self._ledger.expire(now)
        lease = self._ledger.lease(step, self._prompts_per_step, now=now, in_order=self._in_order)
        self._write()
        if lease is None:
            return None
        return Lease(
            step=step,
            life=self._life,
            lease_id=lease.lease_id,
            batches=[LeasedBatch(rows, self._refs_of(rows.place)) for rows in lease.samples],
            num_samples=sum(len(rows.rows) for rows in lease.samples),
            oldest_version=lease.oldest_version,
        )

    def _acknowledge_anew(self, step: int, policy_digest: str) -> None:
        lease = self._try_lease(step)
        if lease is None or not self._ledger.acknowledge(lease.lease_id, policy_digest):
            timeout_s = self._settings.lease_timeout_s
            raise RunError(
                f"the lease of step {step} was not acknowledged within {timeout_s:g} s, and taken "
                "back; raise experience.lease_timeout_s"
            )

    def _refs_of(self, place: BatchPlace) -> list[ray.ObjectRef]:
        held = self._held.get(place)
        return [] if held is None else [held[0]]

    def _hold(self, place: BatchPlace, ref: ray.ObjectRef, info: BatchInfo) -> None:
        self._held[place] = (ref, info)
        self._num_samples += info.num_samples
        self._num_bytes += info.num_bytes

    def _write(self) -> None:
        """Bring the ledger's decisions to disk, and let go of the batches that it needs no more."""
        self._log.append(self._ledger.take_records())
        for place in self._ledger.take_released():
            _, info = self._held.pop(place, (None, None))
            if info is not None:
                self._num_samples -= info.num_samples
                self._num_bytes -= info.num_bytes

    def _has_room(self, info: BatchInfo) -> bool:
        if not self._held:
            return True  # a batch larger than the limits still has to pass, alone
        samples, num_bytes = self._num_samples + info.num_samples, self._num_bytes + info.num_bytes
        return samples <= self._settings.max_samples and num_bytes <= self._settings.max_gib * GIB

    def _is_stuck(self) -> bool:
        """Whether the learner waits for more, and has nothing that it could give back."""
        return self._num_waiting_leases > 0 and self._ledger.counts().leased == 0


class QueueClient:
    """The driver's end of the queue actor. Every call may be made again, to an actor in its place."""

    def __init__(self, settings: ExperienceSettings, journal: Path, **arguments: Any) -> None:
        """Start the actor beside the driver; see `ExperienceQueue` for the arguments."""
        here = ray.get_runtime_context().get_node_id()
        self._actor_class = actor_class_of(ExperienceQueue).options(
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        self._settings, self._journal, self._arguments = settings, journal, arguments
        self._life = 0
        self._acknowledged: Lease | None = None
        self._actor = self._create()

    def start(self) -> Call:
        """Have it read its journal; wait for the call to know that it did."""
        return self._call("start", action="read its journal")

    def dispatch(self, loads: Sequence[WorkerLoad], version: int) -> Call:
        """What may be generated now, by worker."""
        return self._call("dispatch", loads, version, action="hand out prompts")

    def put(self, batch: ray.ObjectRef, info: BatchInfo) -> Call:
        """Add one batch by reference; done when there was room."""
        return self._call("put", [batch], info, action=f"take {info.num_samples} samples (is it full?)")

    def lease(self, step: int) -> Call:
        """The samples of a learner step; done when they are there."""
        return self._call("lease", step, action=f"lease the samples of step {step}")

    def acknowledge(self, lease: Lease, policy_digest: str) -> Call:
        """The learner has trained on a lease. The result: how many prompts before were given up.

        The lease is kept until the next one is acknowledged: Ray never frees the memory of a small object
        whose last reference is that of a process which did not make it, as the actor's is.
        """
        self._acknowledged = lease
        return self._call("acknowledge", lease, policy_digest, action="acknowledge a lease")

    def checkpointed(self, first_step: int) -> Call:
        """No step before `first_step` will be repeated. The result: what could not be compacted."""
        return self._call("checkpointed", first_step, action="compact the journal")

    def served(self, proofs: Sequence[ServedVersion]) -> Call:
        """These versions were proved."""
        return self._call("served", proofs, action="write down what was proved")

    def lost(self, worker: str) -> Call:
        """A rollout worker is gone. The result: how many of its prompts wait again."""
        return self._call("lost", worker, action=f"take back the prompts of {worker}")

    def samples_lost(self, lost: Sequence[tuple[PromptAttempt, str]]) -> Call:
        """Rollouts of these prompts are gone before they were scored, each for a reason."""
        return self._call("samples_lost", lost, action="take back prompts")

    def give_up(self, ordinal: int, reasons: Sequence[str]) -> Call:
        """A sample of a prompt cannot be scored."""
        return self._call("give_up", [(ordinal, tuple(reasons))], action=f"give up prompt {ordinal}")

    def adopt(self, attempts: Sequence[PromptAttempt], version: int, worker: str) -> Call:
        """These prompts are under way on a worker. The result: the ordinals that need not go on."""
        return self._call("adopt", attempts, version, worker, action="hear what is under way")

    def watch(self, heartbeats: Heartbeats, on_failure: OnFailure) -> None:
        """Have `on_failure` called when the actor stops answering, until it is replaced."""
        life = self._life
        heartbeats.watch(QUEUE, self._actor, lambda: self._life == life, on_failure)

    def replace(self, *, first_step: int) -> None:
        """Kill the actor and make another one, which will read all from the journal.

        Args:
            first_step: the learner step under way.
        """
        ray.kill(self._actor, no_restart=True)
        self._life += 1
        self._arguments["first_step"] = first_step
        self._actor = self._create()

    def end(self) -> None:
        """Kill the actor."""
        ray.kill(self._actor, no_restart=True)

    def _create(self) -> Any:
        return self._actor_class.remote(self._settings, self._journal, life=self._life, **self._arguments)

    def _call(self, method: str, *args: Any, action: str) -> Call:
        return Call(getattr(self._actor, method).remote(*args), QUEUE, action)
