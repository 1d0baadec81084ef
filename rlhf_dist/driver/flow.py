"""From prompts to the queue, and from the learner's weights to the workers, while the driver waits.

    prompts ──► RolloutPool ──► ScoringPool ──► ExperienceQueue        learner ──► snapshot ──► RolloutPool

Handlers of what arrives (`cluster.events`): none of them waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import ray
import xxhash

from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.experience_queue import Lease, QueueClient
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.scoring_pool import ScoringHandlers, ScoringPool
from rlhf_dist.config import Config
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.driver.queue_requests import QueueRequests
from rlhf_dist.observability.metrics import Metrics
from rlhf_dist.types import (
    AttemptId,
    PromptAttempt,
    PublishedWeights,
    RolloutReport,
    ScoreReport,
    ServedVersion,
    WeightManifest,
)


@dataclass(frozen=True)
class Roles:
    """The workers of a run."""

    rollout: RolloutPool
    scoring: ScoringPool
    queue: QueueClient
    learner: LearnerGroup


@dataclass
class _Busy:
    """Seconds that workers of each role computed since the last step."""

    rollout_s: float = 0.0
    scoring_s: float = 0.0


@dataclass
class _UnderWay:
    """A prompt that was handed out, until the queue has all samples that were asked for."""

    attempt: PromptAttempt
    worker: str
    version: int
    missing: set[int] = field(default_factory=set)
    num_to_generate: int = 0
    lost: str = ""
    """Why a sample of it is gone that was generated; the others are waited for all the same."""

    @property
    def has_failed(self) -> bool:
        """Whether the worker has nothing more to do for it, and a sample is gone."""
        return bool(self.lost) and self.num_to_generate <= 0


class Flow:
    """What is under way between the roles, and which worker serves which version."""

    def __init__(
        self, config: Config, roles: Roles, order: PromptOrder, probe_tokens: tuple[int, ...]
    ) -> None:
        self.events = Events()
        self.queue = QueueRequests(self.events)
        self._config, self._roles, self._order, self._probe_tokens = config, roles, order, probe_tokens
        self._published: PublishedWeights | None = None
        self._serving: set[int] = set()  # rollout workers that get every new version
        self._proofs: dict[int, ServedVersion] = {}
        self._noted: dict[int, int] = {}  # the newest version of each whose proof is in the journal
        self._unproved: defaultdict[int, list[tuple[ray.ObjectRef, RolloutReport]]] = defaultdict(list)
        self._joining: dict[int, Callable[[], None]] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self._started = self._asking = self._ask_again = False
        # Of the version before the newest one, proved by every worker.
        self._probe_difference_max, self._num_repeated_loads = 0.0, 0
        self._limited_by_room = False  # the queue had as many prompts as the workers took, or more
        self._busy = _Busy()
        roles.scoring.handle(ScoringHandlers(self._on_scored, self._on_given_up, self._on_rollouts_lost))

    @property
    def lease_timeout_s(self) -> float:
        """For a step's experience, which is generated and scored in the meantime."""
        cluster = self._config.cluster
        return cluster.generate_timeout_s + cluster.score_timeout_s + cluster.weights_timeout_s

    @property
    def room_timeout_s(self) -> float:
        """Until a full queue has room: the learner may have to be restored before it takes the next step."""
        cluster, every_steps = self._config.cluster, self._config.checkpoint.every_steps
        restored_s = (
            cluster.placement_timeout_s + cluster.start_timeout_s + every_steps * cluster.step_timeout_s
        )
        return restored_s + cluster.step_timeout_s

    def start(self) -> None:
        """Let prompts flow."""
        self._started = True
        self.hand_out()

    # -------------------------------------------------------------------------------------------- weights

    def publish(self, version: int) -> PublishedWeights:
        """Have the learner publish its weights; the workers load them beside whatever comes next.

        A snapshot overwrites the one before the last, so first all workers must have proved the last one.
        """
        self.wait_until_served()
        if self._published is not None:
            proofs = self._proofs.values()
            self._probe_difference_max = max(each.max_abs_difference for each in proofs)
            self._num_repeated_loads = sum(each.num_loads - 1 for each in proofs)
        published = self._roles.learner.publish(self.events, version, self._probe_tokens)
        self._published = published
        self._load(self._serving)
        return published

    def unpublish(self) -> None:
        """The learner is gone, and its snapshots with it: nobody has to load one before the next is there."""
        self._published = None
        self._roles.rollout.unpublish()

    def wait_until_served(self) -> None:
        """Wait until every rollout worker has proved the newest published version.

        Raises:
            WeightsError: one of them cannot.
        """
        self.events.wait_until(lambda: self._published is None or self._is_served(self._published))

    def _load(self, indices: set[int]) -> None:
        published = self._published
        assert published is not None
        self._roles.rollout.load_weights(
            self.events,
            published,
            partial(self._on_served, published),
            indices=sorted(indices),
            is_wanted=lambda: self._published is published,
        )

    def _is_served(self, published: PublishedWeights) -> bool:
        proved = [self._proofs.get(index) for index in self._serving]
        return bool(proved) and all(
            proof is not None and proof.version == published.manifest.version for proof in proved
        )

    def _on_served(self, published: PublishedWeights, proof: ServedVersion) -> None:
        (index,) = [each for each in self._serving if self._roles.rollout.workers.name(each) == proof.worker]
        before = self._proofs.get(index)
        self._proofs[index] = proof
        self._ask_queue_to_note(index, proof)
        if published is not self._published:
            if before is not None and before.version > proof.version and self._published is not None:
                self._load({index})  # two loads were under way, and the older one came last
            return
        if index in self._joining:
            self._joining.pop(index)()
        if self._started:
            self._hand_out()

    def _ask_queue_to_note(self, index: int, proof: ServedVersion) -> None:
        """Have a proof in the journal; before, no sample of that version is scored, and so none is there."""
        workers = self._roles.rollout.workers
        life = workers.life(index)

        def then(_: None) -> None:
            if workers.life(index) != life:
                return
            self._noted[index] = max(proof.version, self._noted.get(index, proof.version))
            for batch, report in self._unproved.pop(index, []):
                self._score(index, batch, report)

        call = partial(self._roles.queue.served, [proof])
        self.queue.ask(call, then, timeout_s=self._config.cluster.step_timeout_s)

    def _oldest_version(self) -> int:
        return min(proof.version for proof in self._proofs.values())

    # -------------------------------------------------------------------------------------------- workers

    def join(self, index: int, on_served: Callable[[], None]) -> None:
        """A rollout worker has started: bring it the newest weights, then prompts.

        Args:
            on_served: called when it has proved them.
        """
        self._serving.add(index)
        self._joining[index] = on_served
        self._roles.rollout.listen(self.events, index, partial(self._on_rollouts, index))
        if self._published is not None:
            self._load({index})

    def leave(self, index: int) -> set[int]:
        """A rollout worker is gone; returns the prompts that it had under way."""
        self._serving.discard(index)
        for by_worker in (self._proofs, self._joining, self._noted, self._unproved):
            by_worker.pop(index, None)
        name = self._roles.rollout.workers.name(index)
        lost = {ordinal for ordinal, each in self._under_way.items() if each.worker == name}
        for ordinal in lost:
            del self._under_way[ordinal]
        return lost

    def hand_out(self) -> None:
        """Prompts wait again, or a worker has room again."""
        if self._started and self._proofs:
            self._hand_out()

    def has_workers(self) -> bool:
        """Whether any rollout worker has started."""
        return bool(self._serving)

    def is_ready(self) -> bool:
        """Whether every rollout worker has started."""
        return len(self._serving) == len(self._roles.rollout)

    def tell_what_is_under_way(self) -> None:
        """Tell a queue that was rebuilt from its journal, so that nothing is generated again."""
        groups: dict[tuple[int, str], list[PromptAttempt]] = defaultdict(list)
        for each in self._under_way.values():
            groups[each.version, each.worker].append(each.attempt)
        timeout_s = self._config.cluster.score_timeout_s
        for (version, worker), attempts in groups.items():
            call = partial(self._roles.queue.adopt, attempts, version, worker)
            self.queue.ask(call, self._on_needless, timeout_s=timeout_s)

    def answers(self, rows: Sequence[int]) -> list[str]:
        """Greedy responses of the newest policy to rows of the data set, from whichever worker lives."""
        got: list[list[str]] = []
        while not got:
            self.wait_until_served()
            index = min(self._serving)
            life = self._roles.rollout.workers.life(index)
            self._roles.rollout.answer(self.events, index, rows, got.append)
            self.events.wait_until(partial(self._has_or_was_lost, got, index, life))
        return got[0]

    def _has_or_was_lost(self, got: list[list[str]], index: int, life: int) -> bool:
        return bool(got) or self._roles.rollout.workers.life(index) != life

    # -------------------------------------------------------------------------------------------- metrics

    def metrics(self, step: int, lease: Lease, seconds: dict[str, float]) -> Metrics:
        """What a step took, and how old its experience was."""
        busy, self._busy = self._busy, _Busy()
        return {
            "step": step,
            "policy_version": step + 1,
            "probe_difference_max": self._probe_difference_max,
            "num_repeated_loads": self._num_repeated_loads,
            "staleness_max": step - lease.oldest_version,
            "temperature": self._temperature(step),
            "seconds_step": sum(seconds.values()),
            "seconds_rollout": busy.rollout_s / len(self._roles.rollout),
            "seconds_scoring": busy.scoring_s / len(self._roles.scoring),
        } | {f"seconds_{phase}": duration for phase, duration in seconds.items()}

    def _temperature(self, step: int) -> float:
        return self._config.rollout.sampling.temperature_at(step, self._config.run.num_steps)

    def _temperature_of(self, ordinal: int) -> float:
        """What a prompt is sampled at. Where it changes from step to step, the version served is the step."""
        under_way = self._under_way.get(ordinal)
        return self._temperature(under_way.version if under_way is not None else self._oldest_version())

    # -------------------------------------------------------------------------------------------- prompts

    def _hand_out(self) -> None:
        """Ask the queue for what may be generated now; one question at a time."""
        if self._asking:
            self._ask_again = True
            return
        self._asking, self._ask_again = True, False
        rollout, version = self._roles.rollout, self._oldest_version()
        lives = {index: rollout.workers.life(index) for index in sorted(self._proofs)}
        loads = rollout.loads(lives)
        call = partial(self._roles.queue.dispatch, loads, version)
        room = sum(load.room for load in loads)
        timeout_s = self._config.cluster.score_timeout_s
        self.queue.ask(call, partial(self._on_prompts, room, lives, version), timeout_s=timeout_s)

    def _on_prompts(
        self,
        room: int,
        lives: dict[int, int],
        version: int,
        handed_out: dict[int, list[PromptAttempt]],
    ) -> None:
        """Generate; and ask again if the workers have had room since, and that was what set the limit."""
        self._asking = False
        workers = self._roles.rollout.workers
        for index, attempts in handed_out.items():
            if workers.life(index) != lives[index]:
                continue  # it was lost meanwhile, and the queue knows: they wait again
            for attempt in attempts:
                self._under_way[attempt.ordinal] = _UnderWay(
                    attempt, workers.name(index), version, set(attempt.samples), len(attempt.samples)
                )
            rows = self._order.rows_of([attempt.ordinal for attempt in attempts])
            prompts = list(zip(attempts, rows, strict=True))
            temperature = self._temperature_of(attempts[0].ordinal)
            self._roles.rollout.generate(self.events, index, prompts, temperature)
        self._limited_by_room = sum(map(len, handed_out.values())) == room
        has_room = any(load.room for load in self._roles.rollout.loads(self._proofs))
        if self._ask_again or (self._limited_by_room and has_room):
            self.hand_out()

    def _on_rollouts(self, index: int, batch: ray.ObjectRef, report: RolloutReport) -> None:
        self._busy.rollout_s += report.busy_s
        for each in self._prompts_of(report.samples):
            each.num_to_generate -= 1
        self._score(index, batch, report)
        self._generate_again(report.samples)
        if self._limited_by_room:
            self.hand_out()

    def _score(self, index: int, batch: ray.ObjectRef, report: RolloutReport) -> None:
        """Have a worker's rollouts scored, once the proof of all their versions is in the journal."""
        if report.newest_version > self._noted.get(index, -1):
            self._unproved[index].append((batch, report))
            return
        temperature = self._temperature_of(report.samples[0].ordinal)
        self._roles.scoring.score(self.events, batch, report, temperature)

    # ------------------------------------------------------------------------------------------ experience

    def _on_scored(self, batch: ray.ObjectRef, report: ScoreReport) -> None:
        self._busy.scoring_s += report.busy_s
        info = report.info
        if info is None:
            return  # no row could be scored

        def then(_: None) -> None:
            for ordinal, sample in {(each.ordinal, each.sample) for each in info.samples}:
                self._has_sample(ordinal, sample)

        self.queue.ask(partial(self._roles.queue.put, batch, info), then, timeout_s=self.room_timeout_s)

    def _has_sample(self, ordinal: int, sample: int) -> None:
        under_way = self._under_way.get(ordinal)
        if under_way is not None:
            under_way.missing.discard(sample)
            if not under_way.missing:
                del self._under_way[ordinal]

    def _on_given_up(self, ordinal: int, reasons: tuple[str, ...]) -> None:
        self._under_way.pop(ordinal, None)
        self._take_back(partial(self._roles.queue.give_up, ordinal, reasons))

    def _on_rollouts_lost(self, samples: tuple[AttemptId, ...], reason: str) -> None:
        for each in self._prompts_of(samples):
            each.lost = reason
        self._generate_again(samples)

    def _generate_again(self, samples: Sequence[AttemptId]) -> None:
        """Hand prompts out once more of which nothing more is to come and something was lost."""
        failed = {each.attempt: each.lost for each in self._prompts_of(samples) if each.has_failed}
        for attempt in failed:
            del self._under_way[attempt.ordinal]
        if failed:
            self._take_back(partial(self._roles.queue.samples_lost, list(failed.items())))

    def _prompts_of(self, samples: Sequence[AttemptId]) -> list[_UnderWay]:
        """The prompt of each sample, where it is still under way in that attempt."""
        found = [self._under_way.get(each.ordinal) for each in samples]
        return [
            under_way
            for under_way, each in zip(found, samples, strict=True)
            if under_way is not None and under_way.attempt.attempt == each.attempt
        ]

    def _take_back(self, call: Callable[[], Call]) -> None:
        """A call after which other prompts may be handed out."""
        timeout_s = self._config.cluster.score_timeout_s
        self.queue.ask(call, lambda _: self.hand_out(), timeout_s=timeout_s)

    def _on_needless(self, ordinals: Sequence[int]) -> None:
        for ordinal in ordinals:
            self._under_way.pop(ordinal, None)


def policy_digest(manifest: WeightManifest) -> str:
    """One digest of a whole snapshot: xxh3-128 of its tensors' names and digests."""
    named = "".join(f"{entry.name}={entry.digest}\n" for entry in manifest.tensors)
    return xxhash.xxh3_128_hexdigest(named.encode())
