"""The ledger: where every prompt stands, and which samples each learner step gets.

A prompt ordinal goes through these states, each of them at most once except where an arrow leads back:

    waiting ──► in flight ──► scored ──► leased ──► trained
       ▲            │           │          │ ▲
       └────────────┴───────────┘          └─┘   expired: the same step leases the same samples again
       │            │           │
       └────────────┴───────────┴──► failed      after `max_attempts` attempts that were lost or failed, or
                                                 because somebody gave it up

- A prompt is leased when all its samples are scored. A sample counts once: a second copy is refused. A batch
  counts once, too: put again, whether or not this ledger is the one that it was put into, it changes nothing.
- Step s gets no sample whose oldest token is from a version below s - max_staleness. A sample that is found
  too old when a lease is made is dropped, and its prompt waits again.
- What was leased to a step stays that step's for ever, so a step that is repeated, after an expired lease or
  from a checkpoint, gets exactly the samples that it had.

This is a pure object: no clock, no file, no Ray. Whoever holds it appends `take_records()` to the log of
steps after every call and before telling anybody its result; then `Ledger.from_journal` gives it back after a
crash.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal, NamedTuple

from rlhf_dist.durable import Record
from rlhf_dist.errors import ConfigError
from rlhf_dist.experience import steps
from rlhf_dist.experience.journal import JournalReader
from rlhf_dist.experience.ordinals import OrdinalIndex, Ordinals
from rlhf_dist.experience.schema import INFO_COLUMNS, sample_infos
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.types import BatchInfo, BatchPlace, BatchRows, PromptAttempt, SampleInfo


@dataclass(frozen=True)
class Lease:
    """Samples on loan to a learner step, until they are acknowledged or the deadline is past."""

    lease_id: int
    """Another one each time a step is leased: of a repeated lease only the last one can be acknowledged."""
    step: int
    ordinals: tuple[int, ...]
    """Ascending."""
    samples: tuple[BatchRows, ...]
    """Every sample of the ordinals, by its place in the journal; in order of the places."""
    oldest_version: int
    """Of any token."""
    deadline: float
    """On the clock that the caller's `now` is from."""
    policy_digest: str | None
    """What the step's first training ended with, where this is a repetition of a trained step."""


class Receipt(NamedTuple):
    """What became of the rows of a scored batch; of none, where the batch was known already."""

    accepted: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()
    """(row, reason); the reasons are `duplicate` and `failed`."""


class Failure(NamedTuple):
    """A prompt that was given up."""

    ordinal: int
    reasons: tuple[str, ...]
    """One for each attempt that was lost or failed, and those that it was given up for."""


@dataclass(frozen=True)
class Counts:
    """Prompt ordinals in each state. Those never dispatched are in none of them."""

    waiting: int
    in_flight: int
    scored: int
    leased: int
    trained: int
    failed: int

    @property
    def total(self) -> int:
        """Every ordinal that was ever dispatched or passed over."""
        return self.waiting + self.in_flight + self.scored + self.leased + self.trained + self.failed


class _Scored(NamedTuple):
    info: SampleInfo
    place: BatchPlace
    row: int


@dataclass(slots=True)
class _Prompt:
    """One that no step has yet."""

    state: Literal["waiting", "in_flight", "scored"] = "waiting"
    attempt: int = 0
    version: int = 0
    """Oldest policy version that a token of it can have, while in flight or scored."""
    worker: str = ""
    samples: dict[int, _Scored] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """One whose samples are decided."""

    ordinals: tuple[int, ...]
    samples: tuple[BatchRows, ...]
    oldest_version: int
    policy_digest: str | None = None
    holds_batches: bool = True
    """Whether its rows are among the live ones. A step that is repeated reads them from the journal."""
    state: Literal["scored", "leased", "trained"] = "scored"
    lease_id: int | None = None
    deadline: float = 0.0


class Ledger:
    """The state machine of all prompts. Every operation is amortised O(log n) in what it touches."""

    def __init__(self, settings: ExperienceSettings, *, samples_per_prompt: int) -> None:
        """An empty ledger: every ordinal is still to come."""
        self._samples_per_prompt, self._max_staleness = samples_per_prompt, settings.max_staleness
        self._max_attempts, self._lease_timeout_s = settings.max_attempts, settings.lease_timeout_s
        self._prompts: dict[int, _Prompt] = {}
        self._frontier = 0
        """The first ordinal that was never dispatched or passed over."""
        self._decided = Ordinals()
        """Ordinals that have their step, or failed."""
        self._waiting: set[int] = set()
        self._waiting_heap: list[int] = []
        """All that wait, and entries that do not any more, or are there twice."""
        self._in_flight: OrdinalIndex[int] = OrdinalIndex()
        """By oldest version."""
        self._workers: OrdinalIndex[str] = OrdinalIndex()
        self._scored: OrderedDict[int, None] = OrderedDict()
        """In the order in which they were finished."""
        self._scored_by_version: OrdinalIndex[int] = OrdinalIndex()
        self._ready: deque[int] = deque()
        """The scored ones below `_ready_end`, ascending, and some that a step has meanwhile."""
        self._ready_end = 0
        """Every ordinal below is scored or decided."""
        self._steps: dict[int, _Step] = {}
        self._kept_from = 0
        self._restored: dict[int, tuple[int, ...]] = {}
        """Ordinals of steps that were trained before this ledger began, until a checkpoint holds them."""
        self._leases: dict[int, int] = {}
        self._num_leases = 0
        self._num_by_state: Counter[str] = Counter()
        self._failed: dict[int, tuple[str, ...]] = {}
        self._dropped: Counter[str] = Counter()
        self._known_batches: defaultdict[str, Ordinals] = defaultdict(Ordinals)
        """By segment, the numbers of those whose samples were taken or refused."""
        self._live: Counter[BatchPlace] = Counter()
        """Rows of each batch that may still be trained."""
        self._released: list[BatchPlace] = []
        self._records: list[Record] = [
            steps.started_record(samples_per_prompt=samples_per_prompt, max_staleness=self._max_staleness)
        ]

    @classmethod
    def from_journal(
        cls,
        journal: JournalReader,
        settings: ExperienceSettings,
        *,
        samples_per_prompt: int,
        first_step: int,
    ) -> Ledger:
        """The ledger after a crash, from the journal alone.

        Prompts that were in flight wait, until `adopt` says that they still are. Steps before `first_step`
        are trained; those from it on, trained or not, are leased again with exactly the samples that the
        journal says. Attempts that were lost before the crash are forgotten.

        Args:
            first_step: the one that the learner does next: of the checkpoint that it goes on from, or, where
                only the ledger crashed, the one under way.

        Raises:
            ConfigError: the journal was written with another number of samples a prompt.
        """
        history = steps.read_history(journal.folder)
        if history.samples_per_prompt not in (None, samples_per_prompt):
            raise ConfigError(
                f"rollout.samples_per_prompt={samples_per_prompt}, but the journal {journal.folder} was "
                f"written with {history.samples_per_prompt}; set it back, or start in a new run folder"
            )
        ledger = cls(settings, samples_per_prompt=samples_per_prompt)
        unarchived = journal.batches(INFO_COLUMNS, with_archives=False)  # the rest is trained or failed
        batches = ((place, sample_infos(batch)) for place, batch in unarchived)
        ledger.restore(history, batches, first_step)
        return ledger

    def restore(
        self,
        history: steps.StepHistory,
        batches: Iterable[tuple[BatchPlace, Sequence[SampleInfo]]],
        first_step: int,
    ) -> None:
        """Bring an empty ledger to what a log and the batches of a journal say; see `from_journal`."""
        self._restore_steps(history, first_step)
        self._restore_samples(batches, history.stale)

    # ------------------------------------------------------------------------------------ generation

    def dispatchable(self, num_ordinals: int, *, version: int, num_steps: int) -> int:
        """How many prompts more may be handed out so that none has to get too old for its step.

        What policy version v samples can be trained in steps v to v + `max_staleness`; so that many steps'
        prompts, counted from the first step of all, are handed out while v is served.

        Args:
            num_ordinals: prompts of a learner step.
            version: the oldest policy version that may sample a token of them.
            num_steps: of the run.
        """
        counts = self.counts()
        handed_out = counts.in_flight + counts.scored + counts.leased + counts.trained
        return max(0, min(version + self._max_staleness + 1, num_steps) * num_ordinals - handed_out)

    def next_waiting(self, limit: int) -> list[int]:
        """The next ordinals to dispatch, ascending: first those that wait again, then new ones."""
        found: list[int] = []
        while self._waiting_heap and len(found) < limit:
            ordinal = heapq.heappop(self._waiting_heap)
            if ordinal not in found[-1:] and ordinal in self._waiting:
                found.append(ordinal)
        for ordinal in found:
            heapq.heappush(self._waiting_heap, ordinal)
        return found + list(range(self._frontier, self._frontier + limit - len(found)))

    def dispatch(self, ordinals: Iterable[int], *, version: int, worker: str) -> list[PromptAttempt]:
        """Hand prompts to a worker that serves policy version `version`, for the samples still missing.

        Other samples of them that arrive all the same are refused as duplicates.

        Raises:
            ValueError: one of them does not wait.
        """
        dispatched = []
        for ordinal in ordinals:
            self._reach(ordinal)
            if self._state(ordinal) != "waiting":
                raise ValueError(f"prompt {ordinal} does not wait: it is {self._state(ordinal)}")
            prompt = self._prompts[ordinal]
            self._drop_samples(prompt, older_than=version - self._max_staleness)
            self._fly(ordinal, version, worker)
            dispatched.append(PromptAttempt(ordinal, prompt.attempt, self._missing(prompt)))
        return dispatched

    def adopt(self, attempts: Iterable[PromptAttempt], *, version: int, worker: str) -> list[int]:
        """Learn, after a crash of the ledger alone, what a worker had been handed before and still works on.

        These are no new attempts. To be told before anything is dispatched.

        Args:
            attempts: as `dispatch` had returned them.
            version: the oldest policy version that may sample a token of them.

        Returns:
            Those ordinals that need not go on: they are decided, all their samples are scored, they are under
            way elsewhere, or they lack a sample that this attempt is not for, and wait for another one.
        """
        needless = []
        for ordinal, attempt, samples in attempts:
            self._reach(ordinal)
            prompt = self._prompts.get(ordinal)
            if prompt is None or prompt.state != "waiting":
                if prompt is None or (prompt.state, prompt.worker) != ("in_flight", worker):
                    needless.append(ordinal)
            elif set(self._missing(prompt)) <= set(samples):
                prompt.attempt = attempt
                self._fly(ordinal, version, worker)
            else:
                prompt.attempt = max(prompt.attempt, attempt + 1)
                needless.append(ordinal)
        return needless

    def lost(self, worker: str) -> list[Failure]:
        """A worker is gone: its prompts wait for their next attempt. Returns those that were given up."""
        ordinals = sorted(self._workers.of(worker))
        return [
            failure
            for ordinal in ordinals
            if (failure := self._end_attempt(ordinal, f"{worker} was lost")) is not None
        ]

    def failed_attempt(self, ordinal: int, attempt: int, reason: str) -> Failure | None:
        """An attempt failed: the prompt waits for its next one, or is given up. Older ones are ignored."""
        prompt = self._prompts.get(ordinal)
        if prompt is None or prompt.state != "in_flight" or prompt.attempt != attempt:
            return None
        return self._end_attempt(ordinal, reason)

    def give_up(self, ordinal: int, reasons: Sequence[str]) -> Failure | None:
        """Give a prompt up at once, whatever its attempts; those of its samples that are scored are dropped.

        Args:
            reasons: beside those of attempts that were lost or failed.

        Returns:
            None where a step has it or it was given up before: then nothing changes.
        """
        self._reach(ordinal)
        prompt = self._prompts.get(ordinal)
        if prompt is None:
            return None
        self._leave(ordinal)
        prompt.reasons += reasons
        return self._fail(ordinal)

    # ------------------------------------------------------------------------------------- experience

    def scored(self, info: BatchInfo) -> Receipt:
        """Take the samples of a batch that is in the journal.

        Any attempt's samples are welcome, whatever state the prompt is in, but each sample of a prompt once.
        A batch that is known by its place, put before or restored from the journal, changes nothing.

        Raises:
            ValueError: the batch is not in the journal, or a sample's number is out of range.
        """
        if info.place is None:
            raise ValueError("a batch counts only once it is in the journal: BatchInfo.place is None")
        receipt = Receipt() if self._is_known(info.place) else self._take(info.samples, info.place)
        if info.place not in self._live:
            self._released.append(info.place)
        return receipt

    def _is_known(self, place: BatchPlace) -> bool:
        """Whether a batch was seen before; now it is."""
        known = self._known_batches[place.segment]
        if place.batch in known:
            return True
        known.add(place.batch)
        return False

    def _take(self, samples: Sequence[SampleInfo], place: BatchPlace) -> Receipt:
        accepted: list[int] = []
        refused: dict[str, list[tuple[int, SampleInfo]]] = {}
        for row, sample in enumerate(samples):
            reason = self._refusal(sample)
            if reason is None:
                self._accept(_Scored(sample, place, row))
                accepted.append(row)
            else:
                refused.setdefault(reason, []).append((row, sample))
        for reason, entries in refused.items():
            self._record_drop(reason, [sample for _, sample in entries])
        return Receipt(
            tuple(accepted),
            tuple((row, reason) for reason, entries in refused.items() for row, _ in entries),
        )

    def lease(self, step: int, num_ordinals: int, *, now: float, in_order: bool) -> Lease | None:
        """The samples of a learner step, which trains policy version `step`; None while they are not there.

        A step that was leased before gets what it had. If that lease is still out, this one takes its place.

        Args:
            num_ordinals: prompts of the step.
            now: seconds on any clock that only rises; the lease's deadline is on the same.
            in_order: take exactly the next ordinals in ascending order, passing over failed ones. Otherwise
                take those that would be too old for the next step, waiting for such that are in flight, then
                those that were finished first.

        Raises:
            ValueError: the step is before those that `forget_before` kept.
        """
        if step < self._kept_from:
            raise ValueError(f"step {step} was forgotten: the first one kept is {self._kept_from}")
        if step not in self._steps:
            self._drop_stale(step)
            chosen = self._next_in_order(num_ordinals) if in_order else self._most_urgent(step, num_ordinals)
            if chosen is None:
                return None
            self._decide(step, sorted(chosen))
        return self._lend(step, now)

    def acknowledge(self, lease_id: int, policy_digest: str | None = None) -> bool:
        """The learner has trained on a lease. False: it had expired, and the step does not count."""
        step = self._leases.get(lease_id)
        if step is None:
            return False
        entry = self._steps[step]
        self._return(step)
        self._set_state(entry, "trained")
        entry.policy_digest = policy_digest
        if entry.holds_batches:
            entry.holds_batches = False
            for place, rows in entry.samples:
                self._release(place, len(rows))
        self._records.append(steps.trained_record(step, policy_digest))
        return True

    def expire(self, now: float) -> list[int]:
        """Take back the leases whose deadline is past. Returns their steps, which can be leased again."""
        expired = [step for step in self._leases.values() if self._steps[step].deadline <= now]
        for step in expired:
            self._return(step)
        return expired

    # ---------------------------------------------------------------------------------------- recovery

    def recorded_lease(self, step: int) -> Lease | None:
        """What was leased to a step, as it would be leased again, without leasing it. None: nothing was."""
        return self._as_lease(step) if step in self._steps else None

    def forget_before(self, step: int) -> None:
        """A checkpoint holds all steps before `step`: they will not be repeated."""
        self._kept_from = max(self._kept_from, step)
        for each in [each for each, entry in self._steps.items() if each < step and entry.state == "trained"]:
            del self._steps[each]
        self._restored = {each: ordinals for each, ordinals in self._restored.items() if each >= step}

    def done_ordinals(self) -> Ordinals:
        """Those given up, or trained in a step that will not be repeated: a copy of what is so now."""
        kept = [*self._restored.values(), *(entry.ordinals for entry in self._steps.values())]
        return self._decided.without(chain.from_iterable(kept))

    # --------------------------------------------------------------------------------- what others need

    def counts(self) -> Counts:
        """Prompt ordinals in each state; `scored` includes those of a step whose lease expired."""
        return Counts(
            waiting=len(self._waiting),
            in_flight=len(self._prompts) - len(self._waiting) - len(self._scored),
            scored=len(self._scored) + self._num_by_state["scored"],
            leased=self._num_by_state["leased"],
            trained=self._num_by_state["trained"],
            failed=len(self._failed),
        )

    @property
    def dropped(self) -> dict[str, int]:
        """Samples that will not be trained, by reason: `duplicate`, `stale`, `failed`."""
        return dict(self._dropped)

    @property
    def failed(self) -> dict[int, tuple[str, ...]]:
        """Prompts that were given up, with a reason for each attempt."""
        return dict(self._failed)

    def num_failed_before(self, step: int) -> int:
        """Prompts given up among those up to the last one of a step: the same when the step is repeated."""
        last = self._steps[step].ordinals[-1]
        return sum(ordinal < last for ordinal in self._failed)

    def take_records(self) -> list[Record]:
        """What to append to the log of steps, since the last call."""
        records, self._records = self._records, []
        return records

    def take_released(self) -> list[BatchPlace]:
        """Batches that no lease will name any more, unless a step is repeated from the journal."""
        released, self._released = self._released, []
        return released

    # ------------------------------------------------------------------------------------------- prompts

    def _state(self, ordinal: int) -> str:
        prompt = self._prompts.get(ordinal)
        if prompt is not None:
            return prompt.state
        return "failed" if ordinal in self._failed else "decided" if ordinal in self._decided else "new"

    def _reach(self, ordinal: int) -> None:
        """Have every ordinal up to this one known; new ones wait."""
        for new in range(self._frontier, ordinal + 1):
            if new not in self._decided:
                self._prompts[new] = _Prompt()
                self._wait(new)
        self._frontier = max(self._frontier, ordinal + 1)

    def _wait(self, ordinal: int) -> None:
        self._prompts[ordinal].state = "waiting"
        self._waiting.add(ordinal)
        heapq.heappush(self._waiting_heap, ordinal)
        if len(self._waiting_heap) > 2 * len(self._waiting) + 64:
            self._waiting_heap = sorted(self._waiting)

    def _leave(self, ordinal: int) -> None:
        """Take a prompt out of whatever its state has it in."""
        prompt = self._prompts[ordinal]
        if prompt.state == "waiting":
            self._waiting.remove(ordinal)
        elif prompt.state == "in_flight":
            self._in_flight.remove(prompt.version, ordinal)
            self._workers.remove(prompt.worker, ordinal)
        else:
            self._scored_by_version.remove(prompt.version, ordinal)
            del self._scored[ordinal]

    def _fly(self, ordinal: int, version: int, worker: str) -> None:
        """From now on a worker generates the missing samples of a prompt that waited."""
        self._leave(ordinal)
        prompt = self._prompts[ordinal]
        known = [scored.info.oldest_version for scored in prompt.samples.values()]
        prompt.state, prompt.worker, prompt.version = "in_flight", worker, min([version, *known])
        self._in_flight.add(prompt.version, ordinal)
        self._workers.add(worker, ordinal)

    def _missing(self, prompt: _Prompt) -> tuple[int, ...]:
        return tuple(s for s in range(self._samples_per_prompt) if s not in prompt.samples)

    def _end_attempt(self, ordinal: int, reason: str) -> Failure | None:
        prompt = self._prompts[ordinal]
        self._leave(ordinal)
        prompt.reasons.append(reason)
        if len(prompt.reasons) < self._max_attempts:
            prompt.attempt += 1
            self._wait(ordinal)
            return None
        return self._fail(ordinal)

    def _fail(self, ordinal: int) -> Failure:
        prompt = self._prompts.pop(ordinal)
        self._drop_samples(prompt, older_than=None)
        self._decided.add(ordinal)
        self._failed[ordinal] = tuple(prompt.reasons)
        self._records.append(steps.failed_record(ordinal, prompt.reasons))
        return Failure(ordinal, self._failed[ordinal])

    # ------------------------------------------------------------------------------------------- samples

    def _refusal(self, info: SampleInfo) -> str | None:
        if not 0 <= info.sample < self._samples_per_prompt:
            raise ValueError(
                f"sample {info.sample} of prompt {info.ordinal}: a prompt has {self._samples_per_prompt}"
            )
        if info.ordinal in self._decided:
            return "failed" if info.ordinal in self._failed else "duplicate"
        prompt = self._prompts.get(info.ordinal)
        return "duplicate" if prompt is not None and info.sample in prompt.samples else None

    def _accept(self, scored: _Scored) -> None:
        ordinal = scored.info.ordinal
        self._reach(ordinal)
        prompt = self._prompts[ordinal]
        prompt.samples[scored.info.sample] = scored
        self._live[scored.place] += 1
        if len(prompt.samples) == self._samples_per_prompt:
            self._leave(ordinal)
            prompt.state = "scored"
            prompt.version = min(each.info.oldest_version for each in prompt.samples.values())
            self._scored[ordinal] = None
            self._scored_by_version.add(prompt.version, ordinal)
        elif prompt.state == "in_flight" and scored.info.oldest_version < prompt.version:
            self._in_flight.remove(prompt.version, ordinal)
            prompt.version = scored.info.oldest_version
            self._in_flight.add(prompt.version, ordinal)

    def _drop_stale(self, step: int) -> None:
        """Drop every scored sample that is too old for a step; their prompts wait again."""
        limit = step - self._max_staleness
        for version in [version for version in self._scored_by_version if version < limit]:
            for ordinal in list(self._scored_by_version.of(version)):
                prompt = self._prompts[ordinal]
                self._leave(ordinal)
                self._drop_samples(prompt, older_than=limit)
                prompt.attempt += 1
                self._wait(ordinal)
                self._ready_ends_at(ordinal)

    def _drop_samples(self, prompt: _Prompt, *, older_than: int | None) -> None:
        """Forget the samples that are from before a version; None: all, since the prompt failed."""
        dropped = [
            scored
            for scored in prompt.samples.values()
            if older_than is None or scored.info.oldest_version < older_than
        ]
        for scored in dropped:
            del prompt.samples[scored.info.sample]
            self._release(scored.place, 1)
        if dropped:
            reason = "failed" if older_than is None else "stale"
            self._record_drop(reason, [scored.info for scored in dropped])

    def _record_drop(self, reason: str, samples: list[SampleInfo]) -> None:
        self._dropped[reason] += len(samples)
        self._records.append(steps.dropped_record(reason, samples))

    def _release(self, place: BatchPlace, num_rows: int) -> None:
        self._live[place] -= num_rows
        if self._live[place] == 0:
            del self._live[place]
            self._released.append(place)

    # --------------------------------------------------------------------------------------------- steps

    def _next_in_order(self, num_ordinals: int) -> list[int] | None:
        while self._ready_end < self._frontier:
            state = self._state(self._ready_end)
            if state in ("waiting", "in_flight"):
                break
            if state == "scored":
                self._ready.append(self._ready_end)
            self._ready_end += 1
        while self._ready and self._ready[0] not in self._scored:
            self._ready.popleft()
        if len(self._ready) < num_ordinals:
            return None
        chosen = list(islice((ordinal for ordinal in self._ready if ordinal in self._scored), num_ordinals))
        return chosen if len(chosen) == num_ordinals else None

    def _ready_ends_at(self, ordinal: int) -> None:
        """A scored ordinal waits again."""
        self._ready_end = min(self._ready_end, ordinal)
        while self._ready and self._ready[-1] >= ordinal:
            self._ready.pop()

    def _most_urgent(self, step: int, num_ordinals: int) -> list[int] | None:
        if len(self._scored) < num_ordinals:
            return None
        last_call = step - self._max_staleness
        urgent = list(self._scored_by_version.of(last_call))[:num_ordinals]
        if len(urgent) < num_ordinals and self._in_flight.of(last_call):
            return None
        chosen = dict.fromkeys(urgent)
        for ordinal in self._scored:
            if len(chosen) == num_ordinals:
                break
            chosen[ordinal] = None
        return list(chosen)

    def _decide(self, step: int, ordinals: list[int]) -> None:
        samples = [sample for ordinal in ordinals for sample in self._prompts[ordinal].samples.values()]
        rows: dict[BatchPlace, list[int]] = {}
        for sample in samples:
            rows.setdefault(sample.place, []).append(sample.row)
        entry = _Step(
            ordinals=tuple(ordinals),
            samples=tuple(BatchRows(place, tuple(sorted(rows[place]))) for place in sorted(rows)),
            oldest_version=min(sample.info.oldest_version for sample in samples),
        )
        for ordinal in ordinals:
            self._leave(ordinal)
            del self._prompts[ordinal]
            self._decided.add(ordinal)
        self._add_step(step, entry)
        self._records.append(steps.leased_record(step, entry.ordinals, entry.samples, entry.oldest_version))

    def _add_step(self, step: int, entry: _Step) -> None:
        self._steps[step] = entry
        self._num_by_state[entry.state] += len(entry.ordinals)

    def _lend(self, step: int, now: float) -> Lease:
        entry = self._steps[step]
        self._return(step)
        self._num_leases += 1
        entry.lease_id, entry.deadline = self._num_leases, now + self._lease_timeout_s
        self._leases[entry.lease_id] = step
        self._set_state(entry, "leased")
        return self._as_lease(step)

    def _return(self, step: int) -> None:
        """End the lease of a step, if it has one."""
        entry = self._steps[step]
        if entry.lease_id is not None:
            del self._leases[entry.lease_id]
            entry.lease_id = None
            self._set_state(entry, "scored")

    def _set_state(self, entry: _Step, state: Literal["scored", "leased", "trained"]) -> None:
        self._num_by_state[entry.state] -= len(entry.ordinals)
        entry.state = state
        self._num_by_state[state] += len(entry.ordinals)

    def _as_lease(self, step: int) -> Lease:
        entry = self._steps[step]
        return Lease(
            lease_id=entry.lease_id or 0,
            step=step,
            ordinals=entry.ordinals,
            samples=entry.samples,
            oldest_version=entry.oldest_version,
            deadline=entry.deadline,
            policy_digest=entry.policy_digest,
        )

    # ------------------------------------------------------------------------------------------ restoring

    def _restore_steps(self, history: steps.StepHistory, first_step: int) -> None:
        self._dropped = Counter(history.dropped)
        self._kept_from = first_step
        for step, recorded in sorted(history.steps.items()):
            for ordinal in recorded.ordinals:
                self._decided.add(ordinal)
            if step < first_step:
                self._num_by_state["trained"] += len(recorded.ordinals)
                self._restored[step] = recorded.ordinals
            else:
                entry = _Step(recorded.ordinals, recorded.samples, recorded.oldest_version)
                entry.policy_digest, entry.holds_batches = recorded.policy_digest, False
                self._add_step(step, entry)
        for ordinal, reasons in history.failed.items():
            self._failed[ordinal] = tuple(reasons)
            self._decided.add(ordinal)
        self._reach(self._decided.end - 1)

    def _restore_samples(
        self,
        batches: Iterable[tuple[BatchPlace, Sequence[SampleInfo]]],
        stale: set[tuple[int, int, int]],
    ) -> None:
        """Take of each sample the copy of its last attempt, but none that was dropped as too old."""
        newest: dict[tuple[int, int], _Scored] = {}
        attempts: dict[int, int] = {}
        for place, infos in batches:
            self._known_batches[place.segment].add(place.batch)
            for row, info in enumerate(infos):
                if info.ordinal in self._decided:
                    continue
                attempts[info.ordinal] = max(attempts.get(info.ordinal, 0), info.attempt + 1)
                if (info.ordinal, info.sample, info.attempt) in stale:
                    continue
                known = newest.get((info.ordinal, info.sample))
                if known is None or info.attempt > known.info.attempt:
                    newest[info.ordinal, info.sample] = _Scored(info, place, row)
        for scored in newest.values():
            self._accept(scored)
        for ordinal, attempt in attempts.items():
            self._reach(ordinal)
            self._prompts[ordinal].attempt = attempt
