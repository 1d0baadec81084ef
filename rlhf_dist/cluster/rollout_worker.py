"""A rollout worker: one vLLM engine, its step loop, and the proof of the weights it serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import ray

from rlhf_dist.cluster.imports import without_garbage_collection
from rlhf_dist.cluster.liveness import Worker
from rlhf_dist.errors import NotProvedError, WeightsError
from rlhf_dist.types import (
    AttemptId,
    Completion,
    DeviceAddress,
    GenerationRequest,
    PromptAttempt,
    PublishedWeights,
    RolloutReport,
    SegmentAddress,
    ServedVersion,
    Transport,
    WeightPayload,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.engines.settings import RolloutSettings

MAX_LOADS = 2
"""Of one snapshot, until its proof must not fail again."""
LONGEST_WAIT_S = 0.2
"""For a finished sample until it is handed over, while others are still being generated."""


class RolloutWorker(Worker):
    """Consumes prompt ordinals and weight snapshots, produces batches of `ROLLOUT_SCHEMA`.

    An asyncio actor: its engine is stepped by a task of its own, and other calls come in between two steps,
    never during one.
    """

    def __init__(
        self,
        name: str,
        settings: RolloutSettings,
        *,
        model: str,
        dtype: str,
        context_tokens: int,
        probe_tolerance_nats: float,
        prompts: pa.Table,
        seed: int,
        deterministic: bool,
        transport: Transport = "auto",
    ) -> None:
        """Take note of what `start` will load.

        Args:
            model: checkpoint of the starting policy.
            prompts: the data set, tokenized; shared memory of the node.
            seed: of the run.
            deterministic: what finished samples form a batch never depends on the clock.
            transport: of snapshots that are in GPU memory.
        """
        self._name, self._settings, self._seed = name, settings, seed
        self._model, self._dtype, self._prompts = model, dtype, prompts
        self._context_tokens, self._tolerance_nats = context_tokens, probe_tolerance_nats
        self._deterministic, self._transport = deterministic, transport
        self._held: list[GenerationRequest] = []
        self._holding = False
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._num_answers = 0
        self._finished: list[Completion] = []
        self._finished_since = self._busy_s = 0.0
        self._failure: Exception | None = None
        self._work = asyncio.Event()  # the engine may have requests
        self._changed = asyncio.Condition()  # of what the engine has finished

    async def start(self) -> None:
        """Load the model into a vLLM engine, and begin to step it."""
        with without_garbage_collection():
            from rlhf_dist.engines.vllm_engine import VLLMEngine

        self._engine = VLLMEngine(
            self._model, self._settings, context_tokens=self._context_tokens, dtype=self._dtype
        )
        self._stepping = asyncio.create_task(self._step_engine())

    async def generate(self, prompts: Sequence[tuple[PromptAttempt, int]], temperature: float) -> None:
        """Begin with prompts, each with its row of the data set; `results` has the responses."""
        for (ordinal, attempt, samples), row in prompts:
            tokens = self._prompt_tokens(row)
            for sample in samples:
                seed = request_seed(self._seed, ordinal, sample)
                self._add(
                    GenerationRequest(ordinal, sample, row, seed, tokens, _now_us(), attempt, temperature)
                )

    async def results(self) -> AsyncIterator[RolloutReport | pa.RecordBatch | None]:
        """Finished samples for as long as the worker lives: by turns a batch and its report.

        The driver reads the reports; the batches it only passes on. A batch whose report has come is whole.
        """
        from rlhf_dist.experience.schema import rollout_batch

        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._failure is not None or self._has_batch())
            if self._failure is not None:
                yield None  # in a batch's place, so that the error is in its report's, which the driver reads
                raise self._failure
            finished, self._finished = self._finished, []
            busy_s, self._busy_s = self._busy_s, 0.0
            yield rollout_batch(finished, producer=self._name, prompts=self._prompts)
            samples = tuple(AttemptId(each.request.ordinal, each.request.attempt) for each in finished)
            newest = max(each.version_spans[-1].version for each in finished)
            yield RolloutReport(samples, newest, busy_s)

    async def answer(self, rows: Sequence[int]) -> list[str]:
        """Greedy responses to rows of the data set, for people to read."""
        futures = []
        for row in rows:
            self._num_answers += 1
            number = -self._num_answers  # no ordinal is negative
            self._answers[number] = asyncio.get_running_loop().create_future()
            futures.append(self._answers[number])
            tokens = self._prompt_tokens(row)
            self._add(GenerationRequest(number, 0, row, 0, tokens, _now_us(), temperature=0.0))
        return list(await asyncio.gather(*futures))

    async def load_weights(
        self, published: PublishedWeights, payload: WeightPayload | None = None
    ) -> ServedVersion | None:
        """Load a snapshot and prove it; `rollout.on_update` says what becomes of the requests under way.

        Where the proof fails the snapshot is loaded once more, and has to be proved then.

        Args:
            payload: the snapshot's bytes, for a worker that cannot map the learner's memory.

        Returns:
            The proof; None where the payload is needed and was not given.

        Raises:
            WeightsError: a digest or the probe does not match; the run must not go on.
        """
        in_gpu = isinstance(published.segment, DeviceAddress)
        if not in_gpu and payload is None and not _can_map(published):
            return None
        await self._make_way()
        for num_loads in range(1, MAX_LOADS + 1):
            try:
                served = await self._load_and_prove(published, payload)
                break
            except NotProvedError:
                if num_loads == MAX_LOADS:
                    raise
        self._go_on()
        return replace(served, num_loads=num_loads)

    async def _load_and_prove(
        self, published: PublishedWeights, payload: WeightPayload | None
    ) -> ServedVersion:
        from rlhf_dist.weights.certificate import prove

        version, probe = published.manifest.version, published.manifest.probe
        started = time.monotonic()
        if isinstance(published.segment, DeviceAddress) and not self._shares_gpu(published.segment):
            await self._receive(published)
        else:
            self._engine.load_weights(published, payload)
        loaded = time.monotonic()
        logprobs = self._engine.prompt_logprobs(probe.tokens)
        difference = prove(self._name, version, probe, logprobs, self._tolerance_nats)
        return ServedVersion(
            self._name,
            version,
            difference,
            load_s=loaded - started,
            probe_s=time.monotonic() - loaded,
            proved_at_us=_now_us(),
        )

    def _shares_gpu(self, segment: DeviceAddress) -> bool:
        """Whether a snapshot in GPU memory is to be mapped; else the learner sends it."""
        import torch

        from rlhf_dist.weights.device_memory import gpu_uuid

        if self._transport == "nccl":
            return False
        gpu = gpu_uuid(torch.device("cuda"))
        same = self._engine.num_gpus == 1 and gpu == segment.gpu
        if not same and self._transport == "ipc":
            raise WeightsError(
                f"{self._name} is on GPU {gpu}, the learner's snapshots on GPU {segment.gpu}, and "
                "weights.transport=ipc maps them on one GPU only; set weights.transport=auto"
            )
        return same

    async def _receive(self, published: PublishedWeights) -> None:
        """Have the learner send a snapshot while the engine receives it."""
        life = ray.get_runtime_context().get_actor_id()
        link = await published.sender.open_link.remote(self._name, life, self._engine.num_gpus)
        sent = published.sender.send_weights.remote(self._name, published)
        self._engine.load_weights(published, link=link)
        await sent

    async def _make_way(self) -> None:
        """Bring the requests under way to where new weights may come."""
        if self._settings.on_update == "finish":
            self._holding = True
            async with self._changed:
                await self._changed.wait_for(lambda: not self._engine.has_unfinished())
        elif self._settings.on_update == "restart":
            self._held += self._engine.drop_unfinished()

    def _go_on(self) -> None:
        """Begin with the requests that waited for the new weights."""
        self._holding = False
        held, self._held = self._held, []
        for request in held:
            self._add(request)

    def _add(self, request: GenerationRequest) -> None:
        if self._holding:
            self._held.append(request)
            return
        self._engine.add(request, self._settings, max_tokens=self._max_tokens(request))
        self._work.set()

    def _max_tokens(self, request: GenerationRequest) -> int:
        """Of the response: the lowest of the run's limit, the context's room and the limit of the row."""
        room = self._context_tokens - len(request.prompt_tokens)
        limit = self._prompts["max_response_tokens"][request.row].as_py()
        return min(self._settings.sampling.max_tokens, room, room if limit is None else limit)

    async def _step_engine(self) -> None:
        """Step the engine while it has requests, for as long as the worker lives."""
        try:
            while True:
                await self._work.wait()
                if not self._engine.has_unfinished():
                    self._work.clear()
                    continue
                started = time.monotonic()
                self._collect(self._engine.step())
                self._busy_s += time.monotonic() - started
                async with self._changed:
                    self._changed.notify_all()
                await asyncio.sleep(0)  # other calls come in here
        except Exception as error:
            self._failure = error
            async with self._changed:
                self._changed.notify_all()

    def _collect(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            answer = self._answers.pop(completion.request.ordinal, None)
            if answer is not None:
                answer.set_result(completion.text)
                continue
            if not self._finished:
                self._finished_since = time.monotonic()
            self._finished.append(completion)

    def _has_batch(self) -> bool:
        """Whether finished samples are due: enough of them, or the last, or they waited long."""
        if not self._finished:
            return False
        if len(self._finished) >= self._settings.samples_per_batch or not self._engine.has_unfinished():
            return True
        waited_s = time.monotonic() - self._finished_since
        return waited_s > LONGEST_WAIT_S and not self._deterministic

    def _prompt_tokens(self, row: int) -> list[int]:
        return self._prompts["prompt_tokens"][row].as_py()


def request_seed(run_seed: int, ordinal: int, sample: int) -> int:
    """The seed of one request, the same on whichever worker and in whichever batch it runs."""
    return int(np.random.SeedSequence([run_seed, ordinal, sample]).generate_state(1)[0])


def _can_map(published: PublishedWeights) -> bool:
    from rlhf_dist.weights.shared_memory import attach

    assert isinstance(published.segment, SegmentAddress)
    same_node = published.node == ray.get_runtime_context().get_node_id()
    return same_node and attach(published.segment) is not None


def _now_us() -> int:
    return time.time_ns() // 1000
