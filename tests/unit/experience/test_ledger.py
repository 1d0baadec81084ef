"""The ledger: each prompt is trained once or given up, and no step gets a token that is too old."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.errors import ConfigError
from rlhf_dist.experience.journal import JournalReader, JournalWriter
from rlhf_dist.experience.ledger import Counts, Failure, Ledger
from rlhf_dist.experience.ordinals import Ordinals
from rlhf_dist.experience.schema import batch_info
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.types import BatchInfo, BatchPlace, BatchRows, PromptAttempt, SampleInfo


def settings_of(*, max_staleness=0):
    return ExperienceSettings(max_staleness=max_staleness, max_attempts=3, lease_timeout_s=10)


def make(*, samples_per_prompt=1, **options):
    return Ledger(settings_of(**options), samples_per_prompt=samples_per_prompt)


class Batches:
    """Makes the infos of batches in one segment."""

    def __init__(self):
        self.count = 0

    def __call__(self, *samples):
        """Of (ordinal, sample, version) or (ordinal, sample, version, attempt)."""
        infos = [SampleInfo(s[0], s[1], s[3] if len(s) > 3 else 0, s[2], s[2], 10) for s in samples]
        self.count += 1
        return BatchInfo(tuple(infos), num_bytes=1, place=place(self.count - 1))


def place(number):
    return BatchPlace("s-000001", number)


def rows(number, *indices):
    return BatchRows(place(number), indices)


@pytest.fixture
def batch():
    return Batches()


def states(ledger):
    counts = ledger.counts()
    fields = ("waiting", "in_flight", "scored", "leased", "trained", "failed")
    return {name: getattr(counts, name) for name in fields if getattr(counts, name)}


# ------------------------------------------------------------------------------------------ one prompt's way


def test_a_prompt_goes_from_waiting_to_trained(batch):
    ledger = make(samples_per_prompt=2)
    assert ledger.next_waiting(2) == [0, 1]
    assert ledger.dispatch([0, 1], version=0, worker="w") == [
        PromptAttempt(0, 0, (0, 1)),
        PromptAttempt(1, 0, (0, 1)),
    ]
    assert states(ledger) == {"in_flight": 2}
    assert ledger.scored(batch((1, 0, 0), (0, 1, 0))).accepted == (0, 1)
    assert ledger.lease(0, 1, now=0.0, in_order=True) is None, "half of each prompt is not enough"
    assert ledger.scored(batch((0, 0, 0), (1, 1, 0))).accepted == (0, 1)
    assert states(ledger) == {"scored": 2}
    lease = ledger.lease(0, 2, now=5.0, in_order=True)
    assert lease.ordinals == (0, 1)
    assert lease.samples == (rows(0, 0, 1), rows(1, 0, 1))
    assert (lease.step, lease.oldest_version, lease.deadline) == (0, 0, 15.0)
    assert states(ledger) == {"leased": 2}
    assert ledger.acknowledge(lease.lease_id, "digest")
    assert states(ledger) == {"trained": 2}
    assert ledger.counts() == Counts(0, 0, 0, 0, 2, 0)
    assert ledger.counts().total == 2


def test_only_the_samples_of_the_leased_prompts_are_leased(batch):
    ledger = make()
    ledger.dispatch(range(4), version=0, worker="w")
    ledger.scored(batch((3, 0, 0), (0, 0, 0), (2, 0, 0), (1, 0, 0)))
    assert ledger.lease(0, 2, now=0, in_order=True).samples == (rows(0, 1, 3),)


def test_what_was_decided_is_recorded_before_anybody_hears_of_it(batch):
    ledger = make()
    assert ledger.take_records() == [{"event": "started", "samples_per_prompt": 1, "max_staleness": 0}]
    ledger.dispatch([0], version=0, worker="w")
    ledger.scored(batch((0, 0, 0)))
    assert ledger.take_records() == []
    lease = ledger.lease(0, 1, now=0, in_order=True)
    assert ledger.take_records() == [
        {
            "event": "leased",
            "step": 0,
            "ordinals": [0],
            "samples": [["s-000001", 0, [0]]],
            "oldest_version": 0,
        }
    ]
    ledger.acknowledge(lease.lease_id, "abc")
    assert ledger.take_records() == [{"event": "trained", "step": 0, "policy_digest": "abc"}]


def test_a_second_copy_of_a_sample_is_refused_in_every_state(batch):
    ledger = make(samples_per_prompt=2)
    ledger.dispatch([0], version=0, worker="w")
    assert ledger.scored(batch((0, 0, 0), (0, 0, 0))) == ((0,), ((1, "duplicate"),))
    assert ledger.scored(batch((0, 1, 0), (0, 0, 0))) == ((0,), ((1, "duplicate"),))
    assert ledger.scored(batch((0, 1, 0, 1))) == ((), ((0, "duplicate"),))
    lease = ledger.lease(0, 1, now=0, in_order=True)
    assert lease.samples == (rows(0, 0), rows(1, 0))
    assert ledger.scored(batch((0, 1, 0))).refused == ((0, "duplicate"),)
    ledger.acknowledge(lease.lease_id)
    assert ledger.scored(batch((0, 1, 0))).refused == ((0, "duplicate"),)
    assert ledger.dropped == {"duplicate": 5}
    assert {"event": "dropped", "reason": "duplicate", "samples": [[0, 1, 1]]} in ledger.take_records()


def test_a_batch_is_released_when_none_of_its_rows_can_be_trained_any_more(batch):
    ledger = make()
    ledger.dispatch(range(2), version=0, worker="w")
    ledger.scored(batch((0, 0, 0), (1, 0, 0)))
    ledger.scored(batch((1, 0, 0)))
    assert ledger.take_released() == [place(1)], "nothing in it counts"
    assert ledger.acknowledge(ledger.lease(0, 1, now=0, in_order=True).lease_id)
    assert ledger.take_released() == [], "ordinal 1 may still be trained"
    assert ledger.lease(1, 1, now=0, in_order=True) is None, "it is too old for step 1"
    assert ledger.take_released() == [place(0)]


# ------------------------------------------------------------------------------------------------ attempts


def test_the_prompts_of_a_lost_worker_wait_for_their_next_attempt(batch):
    ledger = make(samples_per_prompt=2)
    ledger.dispatch([0, 2], version=0, worker="a")
    ledger.dispatch([1], version=0, worker="b")
    ledger.scored(batch((2, 1, 0)))
    assert ledger.lost("a") == []
    assert states(ledger) == {"waiting": 2, "in_flight": 1}
    assert ledger.next_waiting(4) == [0, 2, 3, 4]
    assert ledger.dispatch([0, 2], version=0, worker="b") == [
        PromptAttempt(0, 1, (0, 1)),
        PromptAttempt(2, 1, (0,)),
    ]
    assert ledger.lost("a") == []
    assert states(ledger) == {"in_flight": 3}


def test_a_late_sample_of_a_lost_attempt_is_welcome_and_the_next_attempts_is_refused(batch):
    ledger = make()
    ledger.dispatch([0], version=0, worker="a")
    ledger.lost("a")
    assert ledger.scored(batch((0, 0, 0, 0))).accepted == (0,)
    assert states(ledger) == {"scored": 1}
    assert ledger.next_waiting(1) == [1]
    assert ledger.scored(batch((0, 0, 0, 1))).refused == ((0, "duplicate"),)


def test_a_prompt_is_given_up_after_its_last_attempt_and_the_next_ones_move_up(batch):
    ledger = make(samples_per_prompt=2)
    ledger.take_records()
    ledger.dispatch([0, 1], version=0, worker="a")
    ledger.scored(batch((0, 0, 0)))
    assert ledger.lost("a") == []
    ledger.dispatch([0], version=0, worker="b")
    assert ledger.failed_attempt(0, 0, "late news of the first attempt") is None
    assert ledger.failed_attempt(0, 1, "the reward raised ValueError") is None
    ledger.dispatch([0], version=0, worker="c")
    reasons = ("a was lost", "the reward raised ValueError", "c was lost")
    assert ledger.lost("c") == [Failure(0, reasons)]
    assert states(ledger) == {"waiting": 1, "failed": 1}
    assert ledger.failed == {0: reasons}
    assert ledger.take_records() == [
        {"event": "dropped", "reason": "failed", "samples": [[0, 0, 0]]},
        {"event": "failed", "ordinal": 0, "reasons": list(reasons)},
    ]
    assert ledger.scored(batch((0, 0, 0))).refused == ((0, "failed"),)
    ledger.dispatch([1, 2], version=0, worker="d")
    ledger.scored(batch((1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)))
    assert ledger.lease(0, 2, now=0, in_order=True).ordinals == (1, 2)


def test_a_prompt_is_given_up_in_whatever_state_it_is(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch(range(4), version=0, worker="a")
    ledger.lost("a")
    ledger.dispatch([0, 2, 3], version=0, worker="b")
    ledger.scored(batch((0, 0, 0), (2, 0, 0)))
    ledger.take_records()
    assert states(ledger) == {"scored": 2, "waiting": 1, "in_flight": 1}
    reasons = ("a was lost", "no colour", "no colour again")
    for ordinal in (0, 1, 3, 5):  # scored, waiting, in flight, never heard of
        lost = reasons[:1] if ordinal < 4 else ()
        assert ledger.give_up(ordinal, reasons[1:]) == Failure(ordinal, lost + reasons[1:])
    assert states(ledger) == {"scored": 1, "waiting": 1, "failed": 4}
    assert ledger.take_records()[:2] == [
        {"event": "dropped", "reason": "failed", "samples": [[0, 0, 0]]},
        {"event": "failed", "ordinal": 0, "reasons": list(reasons)},
    ]
    assert ledger.next_waiting(2) == [4, 6]
    assert ledger.lost("b") == []
    assert ledger.scored(batch((1, 0, 0), (3, 0, 0))).refused == ((0, "failed"), (1, "failed"))
    assert ledger.lease(0, 1, now=0, in_order=True).ordinals == (2,)


def test_what_is_decided_is_not_given_up(leased):
    ledger, lease = leased
    ledger.dispatch([2], version=0, worker="w")
    ledger.give_up(2, ("why",))
    ledger.take_records()
    assert ledger.give_up(2, ("again",)) is None
    assert ledger.give_up(0, ("leased",)) is None
    ledger.acknowledge(lease.lease_id)
    assert ledger.give_up(0, ("trained",)) is None
    assert (states(ledger), ledger.failed) == ({"trained": 2, "failed": 1}, {2: ("why",)})
    assert [record["event"] for record in ledger.take_records()] == ["trained"]


def test_a_prompt_that_is_given_up_lets_those_behind_it_move_up(batch):
    ledger = make()
    ledger.dispatch(range(4), version=0, worker="w")
    ledger.scored(batch((1, 0, 0), (2, 0, 0), (3, 0, 0)))
    assert ledger.lease(0, 2, now=0, in_order=True) is None
    ledger.give_up(0, ("why",))
    ledger.give_up(2, ("why",))
    assert ledger.lease(0, 2, now=0, in_order=True).ordinals == (1, 3)
    assert ledger.dispatchable(2, version=0, num_steps=9) == 0


def test_a_batch_that_is_put_twice_counts_once(batch):
    ledger = make()
    ledger.dispatch(range(2), version=0, worker="w")
    first, second = batch((0, 0, 0)), batch((0, 0, 0), (1, 0, 0))
    ledger.scored(first)
    ledger.scored(second)
    assert ledger.scored(first) == ledger.scored(second) == ((), ())
    assert ledger.dropped == {"duplicate": 1}
    assert ledger.take_released() == [], "both are still to be trained"
    assert ledger.acknowledge(ledger.lease(0, 2, now=0, in_order=True).lease_id)
    assert ledger.take_released() == [place(0), place(1)]
    ledger.scored(first)
    assert ledger.take_released() == [place(0)], "whoever has put it shall not hold on to it"


def test_only_what_waits_is_dispatched():
    ledger = make()
    ledger.dispatch([0], version=0, worker="a")
    with pytest.raises(ValueError, match="prompt 0 does not wait: it is in_flight"):
        ledger.dispatch([0], version=0, worker="b")


def test_ordinals_passed_over_wait(batch):
    ledger = make()
    ledger.scored(batch((3, 0, 0)))  # of a generation that a ledger before this one had asked for
    assert states(ledger) == {"waiting": 3, "scored": 1}
    assert ledger.next_waiting(5) == [0, 1, 2, 4, 5]


def test_a_batch_that_is_not_in_the_journal_does_not_count():
    with pytest.raises(ValueError, match="counts only once it is in the journal"):
        make().scored(BatchInfo((SampleInfo(0, 0, 0, 0, 0, 1),), num_bytes=1))


def test_a_sample_that_a_prompt_does_not_have_is_an_error(batch):
    with pytest.raises(ValueError, match="sample 1 of prompt 7: a prompt has 1"):
        make().scored(batch((7, 1, 0)))


# ---------------------------------------------------------------------------------------------- which ones


def test_in_order_a_step_takes_the_next_ordinals_whoever_was_first(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch(range(6), version=0, worker="w")
    ledger.scored(batch((5, 0, 0), (4, 0, 0), (2, 0, 0), (1, 0, 0)))
    assert ledger.lease(0, 2, now=0, in_order=True) is None, "ordinal 0 is missing"
    ledger.scored(batch((0, 0, 0)))
    assert ledger.lease(0, 2, now=0, in_order=True).ordinals == (0, 1)
    assert ledger.lease(1, 2, now=0, in_order=True) is None
    ledger.scored(batch((3, 0, 0)))
    assert ledger.lease(1, 2, now=0, in_order=True).ordinals == (2, 3)


def test_out_of_order_the_first_to_finish_are_taken(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch(range(4), version=0, worker="w")
    ledger.scored(batch((3, 0, 0), (1, 0, 0), (0, 0, 0)))
    lease = ledger.lease(0, 2, now=0, in_order=False)
    assert lease.ordinals == (1, 3)
    assert lease.samples == (rows(0, 0, 1),)


def test_out_of_order_those_on_their_last_step_go_first_and_are_waited_for(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch([0, 1], version=0, worker="w")
    ledger.dispatch([2, 3, 4], version=1, worker="w")
    ledger.scored(batch((2, 0, 1), (3, 0, 1), (4, 0, 1)))
    assert ledger.lease(0, 2, now=0, in_order=False).ordinals == (2, 3), "nothing presses at step 0"
    ledger.scored(batch((0, 0, 0)))
    assert ledger.lease(1, 2, now=0, in_order=False) is None, "ordinal 1 is in flight since version 0"
    ledger.scored(batch((1, 0, 0)))
    assert ledger.lease(1, 2, now=0, in_order=False).ordinals == (0, 1)


def test_out_of_order_nothing_waits_for_what_is_too_old_anyway_or_has_no_room(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch([0], version=0, worker="w")
    ledger.dispatch([1, 2, 3], version=1, worker="w")
    ledger.scored(batch((1, 0, 1), (2, 0, 1)))
    assert ledger.lease(2, 1, now=0, in_order=False).ordinals == (1,), "room for one, and one is there"
    ledger.scored(batch((3, 0, 1)))
    assert ledger.lease(2, 1, now=0, in_order=False).ordinals == (1,), "a step keeps what it has"


def test_no_step_gets_a_token_that_is_too_old(batch):
    ledger = make(max_staleness=2, samples_per_prompt=2)
    ledger.dispatch([0, 1], version=0, worker="w")
    ledger.scored(batch((0, 0, 3), (0, 1, 0), (1, 0, 1), (1, 1, 3)))
    ledger.take_records()
    assert ledger.lease(3, 2, now=0, in_order=False) is None
    assert states(ledger) == {"waiting": 1, "scored": 1}
    assert ledger.dropped == {"stale": 1}
    assert ledger.take_records() == [{"event": "dropped", "reason": "stale", "samples": [[0, 1, 0]]}]
    assert ledger.dispatch([0], version=3, worker="w") == [PromptAttempt(0, 1, (1,))], "the fresh one stays"
    ledger.scored(batch((0, 1, 3, 1)))
    lease = ledger.lease(3, 2, now=0, in_order=False)
    assert (lease.ordinals, lease.oldest_version) == ((0, 1), 1)
    assert lease.samples == (rows(0, 0, 2, 3), rows(1, 0))


def test_the_next_attempt_drops_what_is_too_old_for_it(batch):
    ledger = make(max_staleness=1, samples_per_prompt=2)
    ledger.dispatch([0], version=0, worker="a")
    ledger.scored(batch((0, 0, 0)))
    ledger.lost("a")
    assert ledger.dispatch([0], version=2, worker="a") == [PromptAttempt(0, 1, (0, 1))]
    assert ledger.dropped == {"stale": 1}


def test_a_stale_prompt_in_the_middle_holds_back_those_behind_it_in_order(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch(range(4), version=0, worker="w")
    ledger.scored(batch((0, 0, 1), (1, 0, 0), (2, 0, 1), (3, 0, 1)))
    assert ledger.lease(1, 9, now=0, in_order=True) is None, "four are ready"
    assert ledger.lease(2, 2, now=0, in_order=True) is None
    assert ledger.next_waiting(1) == [1]
    ledger.dispatch([1], version=2, worker="w")
    ledger.scored(batch((1, 0, 2, 1)))
    assert ledger.lease(2, 3, now=0, in_order=True).ordinals == (0, 1, 2)


def test_no_more_is_handed_out_than_the_served_version_may_sample(batch):
    ledger = make(max_staleness=1)

    def dispatchable(version):
        return ledger.dispatchable(3, version=version, num_steps=3)

    assert dispatchable(0) == 6
    ledger.dispatch(range(4), version=0, worker="w")
    assert dispatchable(0) == 2
    ledger.scored(batch((0, 0, 0), (1, 0, 0), (2, 0, 0)))
    lease = ledger.lease(0, 3, now=0, in_order=True)
    assert dispatchable(0) == 2
    ledger.acknowledge(lease.lease_id)
    assert dispatchable(0) == 2, "the workers still serve the version before the step"
    assert dispatchable(1) == 5
    assert dispatchable(2) == 5, "there is no fourth step"
    assert make(max_staleness=0).dispatchable(3, version=0, num_steps=3) == 3


# ------------------------------------------------------------------------------------------------ leases


@pytest.fixture
def leased(batch):
    """A ledger whose step 0 has ordinals 0 and 1 on lease until 10."""
    ledger = make()
    ledger.dispatch(range(2), version=0, worker="w")
    ledger.scored(batch((0, 0, 0), (1, 0, 0)))
    return ledger, ledger.lease(0, 2, now=0.0, in_order=True)


def test_a_lease_that_was_not_acknowledged_in_time_does_not_count(leased):
    ledger, lease = leased
    assert ledger.expire(9.9) == []
    assert ledger.expire(10.0) == [0]
    assert states(ledger) == {"scored": 2}
    assert not ledger.acknowledge(lease.lease_id)
    again = ledger.lease(0, 2, now=20.0, in_order=False)
    assert (again.samples, again.ordinals, again.deadline) == (lease.samples, lease.ordinals, 30.0)
    assert again.lease_id != lease.lease_id
    assert not ledger.acknowledge(lease.lease_id)
    assert ledger.acknowledge(again.lease_id)
    assert ledger.expire(1e9) == []
    assert states(ledger) == {"trained": 2}


def test_a_step_that_is_asked_for_again_takes_the_place_of_its_lease(leased):
    ledger, lease = leased
    again = ledger.lease(0, 2, now=1.0, in_order=True)
    assert again.samples == lease.samples
    assert not ledger.acknowledge(lease.lease_id)
    assert ledger.acknowledge(again.lease_id)


def test_prompts_of_a_step_are_never_handed_out_again(leased):
    ledger, _ = leased
    ledger.expire(100)
    assert ledger.next_waiting(2) == [2, 3]
    with pytest.raises(ValueError, match="prompt 1 does not wait: it is decided"):
        ledger.dispatch([1], version=0, worker="w")


def test_a_step_that_is_repeated_counts_the_failures_before_it_and_no_later_ones(batch):
    ledger = make(max_staleness=1)
    ledger.dispatch(range(4), version=0, worker="w")
    ledger.give_up(1, ["never mind"])
    ledger.scored(batch((0, 0, 0), (2, 0, 0), (3, 0, 0)))
    lease = ledger.lease(0, 2, now=0, in_order=True)
    assert (lease.ordinals, ledger.num_failed_before(0)) == ((0, 2), 1)
    ledger.give_up(3, ["never mind"])
    assert ledger.num_failed_before(0) == 1


def test_what_a_checkpoint_holds_can_be_forgotten(leased):
    ledger, lease = leased
    ledger.acknowledge(lease.lease_id)
    ledger.forget_before(1)
    assert ledger.recorded_lease(0) is None
    assert states(ledger) == {"trained": 2}
    with pytest.raises(ValueError, match="step 0 was forgotten: the first one kept is 1"):
        ledger.lease(0, 2, now=0, in_order=True)


def test_a_prompt_is_done_when_a_checkpoint_holds_its_step_or_it_was_given_up(batch):
    def done(ledger):
        ordinals = ledger.done_ordinals()
        return [ordinal for ordinal in range(8) if ordinal in ordinals]

    ledger = make(max_staleness=2)
    ledger.dispatch(range(6), version=0, worker="w")
    ledger.give_up(4, ["never mind"])
    ledger.scored(batch((0, 0, 0), (3, 0, 0), (1, 0, 0), (2, 0, 0)))
    for step in (0, 1):
        ledger.acknowledge(ledger.lease(step, 2, now=0, in_order=False).lease_id)
    assert done(ledger) == [4], "both steps may have to be repeated"
    before = ledger.done_ordinals()
    ledger.forget_before(1)
    assert done(ledger) == [0, 3, 4]
    ledger.forget_before(2)
    assert done(ledger) == [0, 1, 2, 3, 4]
    assert 0 not in before, "it was a copy"


@given(numbers=st.lists(st.integers(0, 30)), others=st.sets(st.integers(0, 30)))
def test_ordinals_without_some_are_the_rest(numbers, others):
    ordinals = Ordinals(numbers)
    rest = ordinals.without(others)
    assert [number for number in range(40) if number in rest] == sorted(set(numbers) - others)
    assert [number for number in range(40) if number in ordinals] == sorted(set(numbers))


# ---------------------------------------------------------------------------------------------- recovery


@pytest.fixture
def journaled(tmp_path, completion, scored):
    """A journal in which step 0 trained ordinals 0 and 2, step 1 leased 1, and ordinal 3 is half scored."""
    ledger = make(samples_per_prompt=2, max_staleness=1)
    writer = JournalWriter(tmp_path, "scorer", max_segment_bytes=1 << 30)
    log = StepsLog(tmp_path)

    def put(*samples, version, attempt=0):
        batch = scored([completion(o, s, version=version, attempt=attempt) for o, s in samples])
        receipt = ledger.scored(batch_info(batch, writer.append(batch)))
        log.append(ledger.take_records())
        return receipt

    ledger.dispatch(range(5), version=0, worker="w")
    put((2, 0), (2, 1), (0, 0), version=0)
    put((0, 1), (1, 0), version=0)
    first = ledger.lease(0, 2, now=0, in_order=False)
    ledger.acknowledge(first.lease_id, "digest of step 0")
    put((1, 1), (3, 0), version=1)
    second = ledger.lease(1, 1, now=0, in_order=False)
    log.append(ledger.take_records())
    log.close()
    assert (first.ordinals, second.ordinals) == ((0, 2), (1,))
    return tmp_path, first, second


def restored(folder, first_step, samples_per_prompt=2):
    return Ledger.from_journal(
        JournalReader(folder),
        settings_of(max_staleness=1),
        samples_per_prompt=samples_per_prompt,
        first_step=first_step,
    )


def test_a_step_before_the_one_under_way_is_not_done_until_a_checkpoint_holds_it(journaled):
    """The ledger of a queue that was replaced: the learner may still go back to the last checkpoint."""
    folder, first, _ = journaled
    ledger = restored(folder, first_step=1)
    ledger.forget_before(0)
    assert not any(ordinal in ledger.done_ordinals() for ordinal in range(6))
    ledger.forget_before(1)
    assert [ordinal for ordinal in range(6) if ordinal in ledger.done_ordinals()] == list(first.ordinals)


def test_a_ledger_comes_back_from_the_journal(journaled):
    folder, _, second = journaled
    ledger = restored(folder, first_step=1)
    assert states(ledger) == {"trained": 2, "scored": 1, "waiting": 1}
    again = ledger.lease(1, 99, now=0, in_order=True)
    assert (again.ordinals, again.samples) == (second.ordinals, second.samples)
    assert [
        row["ordinal"] for b in JournalReader(folder).read_rows(again.samples) for row in b.to_pylist()
    ] == [1, 1]
    assert ledger.next_waiting(2) == [3, 4]
    assert ledger.dispatch([3], version=1, worker="w") == [PromptAttempt(3, 1, (1,))]


def test_steps_since_the_checkpoint_are_repeated_with_their_samples(journaled):
    folder, first, second = journaled
    ledger = restored(folder, first_step=0)
    assert states(ledger) == {"scored": 3, "waiting": 1}
    again = ledger.lease(0, 2, now=0, in_order=True)
    assert (again.ordinals, again.samples) == (first.ordinals, first.samples)
    assert again.policy_digest == "digest of step 0"
    assert ledger.acknowledge(again.lease_id)
    assert ledger.recorded_lease(1).samples == second.samples


def test_a_ledger_that_crashed_alone_is_told_what_is_under_way(journaled):
    folder, _, _ = journaled
    ledger = restored(folder, first_step=1)
    handed_out = [PromptAttempt(ordinal, 0, (0, 1)) for ordinal in range(5)]
    assert ledger.adopt(handed_out, version=0, worker="w") == [0, 1, 2], "they have a step"
    assert states(ledger) == {"trained": 2, "scored": 1, "in_flight": 2}
    assert ledger.next_waiting(1) == [5]
    assert ledger.adopt([handed_out[3]], version=0, worker="another") == [3]
    assert ledger.adopt([handed_out[3]], version=0, worker="w") == [], "it still goes on"
    assert ledger.lost("w") == []
    assert ledger.dispatch([3, 4], version=1, worker="w") == [
        PromptAttempt(3, 1, (1,)),
        PromptAttempt(4, 1, (0, 1)),
    ]


def test_an_attempt_that_is_not_for_all_that_is_missing_makes_room_for_the_next(tmp_path):
    ledger = restored(tmp_path, 0)
    assert ledger.adopt([PromptAttempt(0, 3, (1,))], version=0, worker="w") == [0]
    assert ledger.dispatch([0], version=0, worker="w") == [PromptAttempt(0, 4, (0, 1))]


def test_a_prompt_whose_samples_are_all_scored_need_not_go_on(tmp_path, completion, scored):
    writer = JournalWriter(tmp_path, "scorer", max_segment_bytes=1 << 30)
    info = batch_info(scored([completion(0, 0), completion(0, 1)]))
    place = writer.append(scored([completion(0, 0), completion(0, 1)]))
    ledger = restored(tmp_path, 0)
    assert ledger.adopt([PromptAttempt(0, 0, (0, 1))], version=0, worker="w") == [0]
    assert states(ledger) == {"scored": 1}
    assert ledger.scored(BatchInfo(info.samples, 1, place)) == ((), ()), "the journal had it"
    assert ledger.dropped == {}


def test_what_was_dropped_as_too_old_stays_so(tmp_path, completion, scored):
    writer, log = JournalWriter(tmp_path, "scorer", max_segment_bytes=1 << 30), StepsLog(tmp_path)
    ledger = make(samples_per_prompt=2, max_staleness=1)
    first = scored([completion(0, 0, version=0)])
    ledger.dispatch([0], version=0, worker="w")
    ledger.scored(batch_info(first, writer.append(first)))
    ledger.lost("w")
    (again,) = ledger.dispatch([0], version=2, worker="w")
    assert again == PromptAttempt(0, 1, (0, 1))
    log.append(ledger.take_records())
    ledger = restored(tmp_path, 0)
    assert ledger.adopt([again], version=2, worker="w") == []
    second = scored([completion(0, 0, version=2, attempt=1), completion(0, 1, version=2, attempt=1)])
    assert ledger.scored(batch_info(second, writer.append(second))).refused == ()
    assert ledger.dropped == {"stale": 1}
    assert ledger.lease(2, 1, now=0, in_order=True).oldest_version == 2


def test_of_several_copies_the_last_attempt_counts(tmp_path, completion, scored):
    writer = JournalWriter(tmp_path, "scorer", max_segment_bytes=1 << 30)
    for attempt in (0, 2, 1):
        writer.append(scored([completion(0, 0, attempt=attempt, version=attempt)]))
    ledger = restored(tmp_path, 0, samples_per_prompt=1)
    lease = ledger.lease(0, 1, now=0, in_order=True)
    assert (lease.samples, lease.oldest_version) == ((BatchRows(BatchPlace("scorer-000001", 1), (0,)),), 2)


def test_a_journal_of_another_number_of_samples_is_refused(journaled):
    with pytest.raises(ConfigError, match=r"samples_per_prompt=3, but .* was written with 2; set it back"):
        restored(journaled[0], 0, samples_per_prompt=3)


def test_an_empty_journal_is_an_empty_ledger(tmp_path):
    ledger = restored(tmp_path / "missing", 0)
    assert ledger.counts().total == 0
    assert ledger.next_waiting(2) == [0, 1]
