"""All rollout workers: prompts handed to them, rollouts as they finish, weights brought to every one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from rlhf_dist.cluster.calls import Call, wait_for
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.rollout_worker import RolloutWorker
from rlhf_dist.cluster.segment_copy import copy_to_object_store
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import RolloutSettings
from rlhf_dist.errors import DataLostError, RunError, WeightsError
from rlhf_dist.experience.dispatch import WorkerLoad
from rlhf_dist.types import PromptAttempt, PublishedWeights, RolloutReport, ServedVersion

OnBatch = Callable[[ray.ObjectRef, RolloutReport], None]
OnServed = Callable[[ServedVersion], None]
OnAnswers = Callable[[list[str]], None]


class RolloutPool:
    """Consumes prompt ordinals, produces references to rollout batches."""

    def __init__(
        self,
        settings: RolloutSettings,
        share: RoleShare,
        cluster: ClusterSettings,
        prompts: pa.Table,
        **worker_arguments: Any,
    ) -> None:
        """Create the workers; see `RolloutWorker` for its arguments.

        Args:
            prompts: the tokenized data set; put into the object store once, mapped by every worker.
        """
        self._settings, self._cluster = settings, cluster
        self.prompts = ray.put(prompts)
        """Reference to the tokenized data set."""

        def arguments(index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (f"rollout worker {index}", settings), worker_arguments | {"prompts": self.prompts}

        self.workers = Workers(
            RolloutWorker, share, placement_timeout_s=cluster.placement_timeout_s, arguments=arguments
        )
        self._elsewhere: set[int] = set()  # workers that cannot map the learner's memory
        self._row_limits = prompts["max_response_tokens"]
        self._under_way: list[Counter[int]] = [Counter() for _ in range(len(self.workers))]
        """For each worker: samples that are still to come, by ordinal."""
        self._longest: list[dict[int, int]] = [{} for _ in self._under_way]
        """Tokens that a response to each of those may have."""

    def __len__(self) -> int:
        return len(self.workers)

    def start(self, events: Events, index: int, on_started: Callable[[], None]) -> None:
        """Have a worker load its engine."""
        self.workers.expect(
            events,
            index,
            "start",
            action="start its vLLM engine",
            then=lambda _: on_started(),
            timeout_s=self._cluster.start_timeout_s,
        )

    def dismiss(self, events: Events, index: int) -> None:
        """Kill a worker; what it had under way will not come."""
        self.workers.dismiss(events, index)
        self._under_way[index].clear()
        self._longest[index].clear()
        self._elsewhere.discard(index)

    def loads(self, indices: Iterable[int]) -> list[WorkerLoad]:
        """What these workers have to do, and how many prompts more each takes: an engine's sequences and a
        quarter more, which wait in it for the next free place; at least one prompt."""
        per_prompt = self._settings.samples_per_prompt
        capacity = self._settings.max_num_seqs + math.ceil(self._settings.max_num_seqs / 4)
        max_tokens = self._settings.sampling.max_tokens
        loads = []
        for index in indices:
            under_way = self._under_way[index]
            num_samples = under_way.total()
            room = (capacity - num_samples) // per_prompt
            loads.append(
                WorkerLoad(
                    index,
                    num_tokens=sum(count * self._longest[index][each] for each, count in under_way.items()),
                    tokens_per_prompt=per_prompt * max_tokens,
                    room=max(room, 0 if num_samples else 1),
                )
            )
        return loads

    def generate(
        self, events: Events, index: int, prompts: Sequence[tuple[PromptAttempt, int]], temperature: float
    ) -> None:
        """Have a worker begin with prompts, each with its row of the data set."""
        for attempt, row in prompts:
            self._under_way[index][attempt.ordinal] += len(attempt.samples)
            self._longest[index][attempt.ordinal] = self._longest_response(row)
        self.workers.expect(
            events,
            index,
            "generate",
            prompts,
            temperature,
            action="take prompts",
            then=lambda _: None,
            timeout_s=self._cluster.generate_timeout_s,
        )

    def listen(self, events: Events, index: int, on_batch: OnBatch) -> None:
        """Have `on_batch` called with the reference of each batch of a worker's finished rollouts, and its
        report."""
        stream = self.workers.actors[index].results.options(num_returns="streaming").remote()
        events.listen(
            stream,
            self.workers.name(index),
            "finish samples (cluster.generate_timeout_s)",
            partial(self._on_item, index, [], on_batch),
            self._cluster.generate_timeout_s,
            idle=partial(self._is_idle, index),
            on_failure=lambda error: self.workers.on_failure(index, error),
        )

    def answer(self, events: Events, index: int, rows: Sequence[int], then: OnAnswers) -> None:
        """Have `then` called with a worker's greedy responses to rows of the data set."""
        self.workers.expect(
            events,
            index,
            "answer",
            rows,
            action="answer sample prompts",
            then=then,
            timeout_s=self._cluster.generate_timeout_s,
        )

    def load_weights(
        self,
        events: Events,
        published: PublishedWeights,
        on_served: OnServed,
        *,
        indices: Iterable[int] | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Have workers load and prove a snapshot; `on_served` is called with each proof.

        Those on the learner's node map it. For the others, which say so when first asked, it is copied into
        the object store, and their nodes pull it once each.

        Args:
            indices: of the workers; None for all.
            is_wanted: nobody wants a snapshot any more whose learner is gone, and that it cannot be read or
                proved is no failure then.
        """
        payload = copy_to_object_store(published) if self._elsewhere else None
        for index in range(len(self)) if indices is None else indices:
            self._load(events, index, published, payload, on_served, is_wanted)

    def unpublish(self) -> None:
        """The learner is gone: who could not map its memory may map that of the next one."""
        self._elsewhere.clear()

    def end(self) -> None:
        """Kill the workers."""
        self.workers.end()

    def _longest_response(self, row: int) -> int:
        """Tokens of a response to a row of the data set, at most."""
        limit, max_tokens = self._row_limits[row].as_py(), self._settings.sampling.max_tokens
        return max_tokens if limit is None else min(limit, max_tokens)

    def _is_idle(self, index: int) -> bool:
        return not self._under_way[index]

    def _load(
        self,
        events: Events,
        index: int,
        published: PublishedWeights,
        payload: ray.ObjectRef | None,
        on_served: OnServed,
        is_wanted: Callable[[], bool],
    ) -> None:
        def then(proof: ServedVersion | None) -> None:
            if proof is not None:
                on_served(proof)
            elif is_wanted():
                self._elsewhere.add(index)
                copied = copy_to_object_store(published)
                self._load(events, index, published, copied, on_served, is_wanted)

        def failed(error: RunError) -> None:
            if is_wanted() or not isinstance(error, WeightsError | DataLostError):
                self.workers.on_failure(index, error)

        action = f"load policy version {published.manifest.version}"
        given = payload if index in self._elsewhere else None
        call = self.workers.call(index, "load_weights", published, given, action=action)
        events.expect(call, then, self._cluster.weights_timeout_s, on_failure=failed)

    def _on_item(
        self, index: int, unreported: list[ray.ObjectRef], on_batch: OnBatch, item: ray.ObjectRef
    ) -> None:
        """A worker's items are by turns batches and their reports."""
        if not unreported:
            unreported.append(item)
            return
        call = Call(item, self.workers.name(index), "generate")
        try:
            report: RolloutReport = wait_for(call, self._cluster.generate_timeout_s)
        except RunError as error:
            self.workers.on_failure(index, error)
            return
        finished = Counter(each.ordinal for each in report.samples)
        self._under_way[index] -= finished
        for ordinal in finished.keys() - self._under_way[index].keys():
            self._longest[index].pop(ordinal, None)
        on_batch(unreported.pop(), report)
