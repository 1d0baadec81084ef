"""All rollout workers: prompts spread over them, weights brought to every one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from rlhf_dist.cluster.calls import Call, next_of, wait_for
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.rollout_worker import RolloutWorker
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.settings import RolloutSettings
from rlhf_dist.errors import DeadlineError
from rlhf_dist.types import ServedVersion, WeightManifest


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
        self._cluster = cluster
        table = ray.put(prompts)

        def arguments(index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (f"rollout worker {index}", settings), worker_arguments | {"prompts": table}

        self._workers = Workers(
            RolloutWorker, share, placement_timeout_s=cluster.placement_timeout_s, arguments=arguments
        )

    def start(self) -> list[Call]:
        """Have every engine begin to load; wait for the calls to know that it did."""
        return self._workers.start(action="start its vLLM engine")

    def generate(
        self, prompts: Sequence[tuple[int, int]], temperature: float
    ) -> Iterator[tuple[ray.ObjectRef, int]]:
        """Batches of rollouts as they finish on any worker: a reference and its number of samples.

        Args:
            prompts: (ordinal, row of the data set) of each.
        """
        streams: dict[Any, int] = {}
        for index, actor in enumerate(self._workers.actors):
            part = prompts[index :: len(self._workers)]
            if part:
                stream = actor.generate.options(num_returns="streaming").remote(part, temperature)
                streams[stream] = index
        while streams:
            ready, _ = ray.wait(
                list(streams), num_returns=1, timeout=self._cluster.generate_timeout_s, fetch_local=False
            )
            if not ready:
                names = ", ".join(self._workers.name(index) for index in streams.values())
                raise DeadlineError(
                    f"{names} finished no samples within {self._cluster.generate_timeout_s:g} s "
                    "(cluster.generate_timeout_s)"
                )
            for stream in ready:
                batch = self._next_batch(stream, self._workers.name(streams[stream]))
                if batch is None:
                    del streams[stream]
                else:
                    yield batch

    def answer(self, rows: Sequence[int]) -> list[str]:
        """Greedy responses to rows of the data set, from one worker."""
        call = self._workers.call(0, "answer", rows, action="answer sample prompts")
        return wait_for(call, self._cluster.generate_timeout_s)

    def load_weights(self, manifest: WeightManifest, payload: ray.ObjectRef) -> list[ServedVersion]:
        """Have every worker load and prove a snapshot; the payload goes from the object store to them."""
        return self._workers.call_all(
            "load_weights",
            manifest,
            payload,
            action=f"load policy version {manifest.version}",
            timeout_s=self._cluster.weights_timeout_s,
        )

    def end(self) -> None:
        """Kill the workers."""
        self._workers.end()

    def _next_batch(self, stream: Any, worker: str) -> tuple[ray.ObjectRef, int] | None:
        timeout_s = self._cluster.generate_timeout_s
        try:
            num_samples = wait_for(next_of(stream, worker, "generate", timeout_s), timeout_s)
        except StopIteration:
            return None
        return next_of(stream, worker, "hand over its samples", timeout_s).ref, num_samples
