"""Random lives of a ledger: prompts handed out and given up, samples late, doubled and stale, batches put
twice, workers lost, crashes of everything and of the ledger alone.

The model is the journal itself, a list of records and a list of batches, what the learner did, and what the
driver knows to be under way.
"""

from __future__ import annotations

from itertools import count, islice

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rlhf_dist.experience.ledger import Ledger, Receipt
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.experience.steps import failed_record, history_of
from rlhf_dist.types import BatchInfo, BatchPlace, SampleInfo

WORKERS = ("a", "b")


class LedgerLife(RuleBasedStateMachine):
    """The learner, the workers and the journal around one ledger."""

    def __init__(self):
        super().__init__()
        self.records, self.batches = [], []
        self.generated = []  # (PromptAttempt, version) of everything that was ever handed out
        self.under_way = {worker: {} for worker in WORKERS}  # ordinal -> the same, as the driver knows it
        self.unput = []  # batches in the journal that the ledger was not told of
        self.leases = {}  # step -> what it was leased first
        self.trained = {}  # step -> ordinals, as the learner's state has them
        self.lease = None
        self.released = set()
        self.num_batches_before_crash = 0
        self.step = self.checkpoint = 0
        self.now = 0.0

    @initialize(
        samples_per_prompt=st.integers(1, 3),
        max_staleness=st.integers(0, 2),
        max_attempts=st.sampled_from([2, 1000]),
        num_ordinals=st.integers(1, 3),
    )
    def begin(self, samples_per_prompt, max_staleness, max_attempts, num_ordinals):
        self.settings = ExperienceSettings(
            max_staleness=max_staleness, max_attempts=max_attempts, lease_timeout_s=10
        )
        self.samples_per_prompt = samples_per_prompt
        self.num_ordinals = num_ordinals
        self.ledger = Ledger(self.settings, samples_per_prompt=self.samples_per_prompt)

    def after(self, result):
        """What the queue does after every call: write the records, then answer."""
        self.records += self.ledger.take_records()
        self.released |= set(self.ledger.take_released())
        return result

    # ------------------------------------------------------------------------------------------ generation

    @rule(worker=st.sampled_from(WORKERS), limit=st.integers(1, 4), lag=st.integers(0, 2))
    def dispatch(self, worker, limit, lag):
        version = max(0, self.step - lag)
        ordinals = self.ledger.next_waiting(limit)
        dispatched = self.after(self.ledger.dispatch(ordinals, version=version, worker=worker))
        assert [each.ordinal for each in dispatched] == ordinals
        self.generated += [(each, version) for each in dispatched]
        self.under_way[worker] |= {each.ordinal: (each, version) for each in dispatched}

    @rule(worker=st.sampled_from(WORKERS))
    def lose_worker(self, worker):
        before = self.ledger.counts()
        failures = self.after(self.ledger.lost(worker))
        self.under_way[worker].clear()
        after = self.ledger.counts()
        num_lost = before.in_flight - after.in_flight
        assert num_lost == after.waiting + after.failed - before.waiting - before.failed >= len(failures)

    @precondition(lambda self: self.generated)
    @rule(data=st.data())
    def fail_attempt(self, data):
        dispatch, _ = data.draw(st.sampled_from(self.generated))
        self.after(self.ledger.failed_attempt(dispatch.ordinal, dispatch.attempt, "it failed"))
        for mine in self.under_way.values():
            if mine.get(dispatch.ordinal, (None,))[0] == dispatch:
                del mine[dispatch.ordinal]

    @rule(data=st.data())
    def give_up(self, data):
        handed_out = [attempt.ordinal for attempt, _ in self.generated[-8:]]
        new = self.ledger.next_waiting(1)[0] + 1
        ordinal = data.draw(st.sampled_from([*handed_out, new]))
        leased = any(ordinal in lease.ordinals for lease in self.leases.values())
        failed, states = self.ledger.failed, self.ledger.counts()
        failure = self.after(self.ledger.give_up(ordinal, ("nobody", "wants it")))
        if leased or ordinal in failed:
            assert failure is None
            assert (self.ledger.failed, self.ledger.counts()) == (failed, states)
        else:
            assert failure.ordinal == ordinal
            assert failure.reasons[-2:] == ("nobody", "wants it")
            assert self.ledger.failed == failed | {ordinal: failure.reasons}
            assert self.records[-1] == failed_record(ordinal, failure.reasons)

    @precondition(lambda self: self.generated)
    @rule(data=st.data(), num_samples=st.integers(1, 4), told=st.booleans())
    def score(self, data, num_samples, told):
        """Any samples of any attempt, those that were scored before too; the ledger may hear of it later."""
        infos = []
        for _ in range(num_samples):
            dispatch, version = data.draw(st.sampled_from(self.generated[-8:] + self.generated[:2]))
            sample = data.draw(st.integers(0, self.samples_per_prompt - 1))
            oldest = data.draw(st.integers(min(version, self.step), self.step))
            infos.append(SampleInfo(dispatch.ordinal, sample, dispatch.attempt, oldest, self.step, 5))
        batch = self.write_journal(infos)
        if told:
            self.put(batch)
        else:
            self.unput.append(batch)

    def write_journal(self, infos):
        place = BatchPlace(f"s-00000{1 + len(self.batches) % 2}", len(self.batches) // 2)
        self.batches.append((place, infos))
        return BatchInfo(tuple(infos), num_bytes=1, place=place)

    def put(self, batch):
        receipt = self.after(self.ledger.scored(batch))
        rows = sorted([*receipt.accepted, *(row for row, _ in receipt.refused)])
        assert rows == list(range(len(batch.samples)))

    @precondition(lambda self: self.unput)
    @rule()
    def put_later(self):
        self.put(self.unput.pop())

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def put_again(self, data):
        """It changes nothing, but for batches that are not to be held on to, which are released again."""
        place, infos = data.draw(st.sampled_from(self.batches))
        if place in [batch.place for batch in self.unput]:
            return
        before = self.ledger.counts(), self.ledger.dropped, len(self.records)
        assert self.after(self.ledger.scored(BatchInfo(tuple(infos), num_bytes=1, place=place))) == Receipt()
        assert (self.ledger.counts(), self.ledger.dropped, len(self.records)) == before

    # ------------------------------------------------------------------------------------------ the learner

    @rule(in_order=st.booleans())
    def take_lease(self, in_order):
        lease = self.after(self.ledger.lease(self.step, self.num_ordinals, now=self.now, in_order=in_order))
        if lease is None:
            assert self.step not in self.leases, "a step that had its samples has them again"
            return
        self.lease = lease
        first = self.leases.setdefault(self.step, lease)
        assert (lease.ordinals, lease.samples) == (first.ordinals, first.samples)
        if first is lease:
            self.check_new_lease(lease, in_order)

    def check_new_lease(self, lease, in_order):
        if in_order:
            others = {o for step, each in self.leases.items() if step != self.step for o in each.ordinals}
            free = (o for o in count() if o not in others and o not in self.ledger.failed)
            assert lease.ordinals == tuple(islice(free, self.num_ordinals))
        assert self.released.isdisjoint(place for place, _ in lease.samples)
        batches = dict(self.batches)
        infos = [batches[place][row] for place, rows in lease.samples for row in rows]
        expected = [(o, s) for o in lease.ordinals for s in range(self.samples_per_prompt)]
        assert sorted((info.ordinal, info.sample) for info in infos) == expected
        assert len(lease.ordinals) == self.num_ordinals
        oldest = min(info.oldest_version for info in infos)
        assert lease.oldest_version == oldest >= self.step - self.settings.max_staleness

    @precondition(lambda self: self.lease is not None)
    @rule()
    def acknowledge(self):
        assert self.after(self.ledger.acknowledge(self.lease.lease_id))
        assert not self.ledger.acknowledge(self.lease.lease_id), "once"
        self.trained[self.step] = self.lease.ordinals
        self.lease = None
        self.step += 1

    @precondition(lambda self: self.lease is not None)
    @rule()
    def let_the_lease_expire(self):
        assert self.after(self.ledger.expire(self.lease.deadline - 0.5)) == []
        assert self.after(self.ledger.expire(self.lease.deadline)) == [self.step]
        assert not self.ledger.acknowledge(self.lease.lease_id)
        self.now, self.lease = self.lease.deadline, None

    @rule()
    def save_checkpoint(self):
        self.checkpoint = self.step
        self.ledger.forget_before(self.step)

    @rule()
    def crash(self):
        """The ledger is gone, and the learner and the workers with it."""
        self.back_to_checkpoint()
        self.restore(self.checkpoint)
        for mine in self.under_way.values():
            mine.clear()

    @rule(to_the_end=st.booleans())
    def crash_of_the_ledger_alone(self, to_the_end):
        """The learner stays where it is, the workers go on, and so do batches on their way to the ledger."""
        before, failed, dropped = self.ledger.counts(), self.ledger.failed, self.ledger.dropped
        self.lease = None
        unput, self.unput = self.unput, []
        self.restore(self.step)
        for batch in unput:
            assert self.after(self.ledger.scored(batch)) == Receipt(), "the journal had it"
        assert (self.ledger.failed, self.ledger.dropped) == (failed, dropped)
        after = self.ledger.counts()
        assert (after.trained, after.failed, after.in_flight) == (before.trained, before.failed, 0)
        for worker in WORKERS:
            self.adopt(worker)
        assert self.ledger.counts().in_flight == sum(map(len, self.under_way.values()))
        assert self.ledger.counts().scored == after.scored
        if to_the_end:
            for worker in WORKERS:
                self.finish(worker)
            assert self.ledger.counts().in_flight == 0

    def adopt(self, worker):
        mine = self.under_way[worker]
        for attempt, version in list(mine.values()):
            for ordinal in self.after(self.ledger.adopt([attempt], version=version, worker=worker)):
                del mine[ordinal]

    def finish(self, worker):
        """It delivers all that it was asked for."""
        for attempt, version in self.under_way[worker].values():
            infos = [
                SampleInfo(attempt.ordinal, s, attempt.attempt, version, version, 5) for s in attempt.samples
            ]
            self.put(self.write_journal(infos))
        self.under_way[worker].clear()

    def restore(self, first_step):
        self.ledger = Ledger(self.settings, samples_per_prompt=self.samples_per_prompt)
        self.ledger.restore(history_of(self.records), self.batches, first_step)
        self.unput = []
        self.after(None)
        self.released = set()
        self.num_batches_before_crash = len(self.batches)

    def back_to_checkpoint(self):
        self.step, self.lease = self.checkpoint, None
        self.trained = {step: ordinals for step, ordinals in self.trained.items() if step < self.step}

    # ------------------------------------------------------------------------------------------- invariants

    @invariant()
    def states_add_up(self):
        counts = self.ledger.counts()
        assert min(counts.waiting, counts.in_flight, counts.scored, counts.leased, counts.failed) >= 0
        assert counts.total == self.ledger.next_waiting(counts.waiting + 1)[-1], "the first new ordinal"
        assert counts.trained == sum(len(ordinals) for ordinals in self.trained.values())
        assert counts.failed == len(self.ledger.failed)
        assert counts.leased == (self.num_ordinals if self.lease is not None else 0)

    @invariant()
    def no_prompt_has_two_steps(self):
        leased = [ordinal for lease in self.leases.values() for ordinal in lease.ordinals]
        assert len(leased) == len(set(leased))
        assert not set(leased) & set(self.ledger.failed)

    @invariant()
    def what_is_dispatchable_keeps_to_its_bound(self):
        counts = self.ledger.counts()
        handed_out = counts.in_flight + counts.scored + counts.leased + counts.trained
        for version in range(3):
            num_steps = min(version + self.settings.max_staleness + 1, 2)
            found = self.ledger.dispatchable(self.num_ordinals, version=version, num_steps=2)
            assert found == max(0, num_steps * self.num_ordinals - handed_out)

    def teardown(self):
        """From wherever it stands, run on without mishaps: every prompt is trained once, or failed."""
        if not hasattr(self, "ledger"):
            return
        for worker in WORKERS:
            self.lose_worker(worker)
        while self.unput:
            self.put_later()
        known = self.ledger.counts().total
        rounds = 0
        while (missing := known - len(self.done() & set(range(known)))) > 0:
            rounds += 1
            assert rounds < 100 + 10 * known, f"{missing} prompts are never trained"
            self.run_one_step(in_order=rounds % 2 == 0)
        assert set(range(known)) <= self.done()
        for place, infos in self.batches[self.num_batches_before_crash :]:
            if {info.ordinal for info in infos} <= self.done():
                assert place in self.released
        self.no_prompt_has_two_steps()
        self.states_add_up()

    def done(self):
        return {o for ordinals in self.trained.values() for o in ordinals} | set(self.ledger.failed)

    def run_one_step(self, in_order):
        self.take_lease(in_order)
        while self.lease is None:
            waiting = self.ledger.next_waiting(self.ledger.counts().waiting + self.num_ordinals)
            for each in self.after(self.ledger.dispatch(waiting, version=self.step, worker="z")):
                infos = [
                    SampleInfo(each.ordinal, s, each.attempt, self.step, self.step, 5) for s in each.samples
                ]
                self.put(self.write_journal(infos))
            self.take_lease(in_order)
        self.acknowledge()


@pytest.mark.parametrize(("num_steps", "num_lives"), [(15, 100), (60, 40)])
def test_every_life_of_a_ledger_ends_well(num_steps, num_lives):
    run_state_machine_as_test(
        LedgerLife,
        settings=settings(
            max_examples=num_lives,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
