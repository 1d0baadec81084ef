"""A rollout worker: one vLLM engine, its step loop, and the proof of the weights it serves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_dist.types import Completion, GenerationRequest, ServedVersion, WeightManifest, WeightPayload

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.engines.settings import RolloutSettings


class RolloutWorker:
    """Consumes prompt ordinals and weight snapshots, produces batches of `ROLLOUT_SCHEMA`."""

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
    ) -> None:
        """Take note of what `start` will load.

        Args:
            model: checkpoint of the starting policy.
            prompts: the data set, tokenized; shared memory of the node.
            seed: of the run.
        """
        self._name, self._settings, self._seed = name, settings, seed
        self._model, self._dtype, self._prompts = model, dtype, prompts
        self._context_tokens, self._tolerance_nats = context_tokens, probe_tolerance_nats

    def start(self) -> None:
        """Load the model into a vLLM engine."""
        from rlhf_dist.engines.vllm_engine import VLLMEngine

        self._engine = VLLMEngine(
            self._model, self._settings, context_tokens=self._context_tokens, dtype=self._dtype
        )

    def generate(
        self, prompts: Sequence[tuple[int, int]], temperature: float
    ) -> Iterator[int | pa.RecordBatch]:
        """Responses to prompts as they finish: by turns a batch's number of samples and the batch itself.

        The driver reads the numbers; the batches it only passes on.

        Args:
            prompts: (ordinal, row of the data set) of each.
        """
        from rlhf_dist.experience.schema import rollout_batch

        for ordinal, row in prompts:
            self._add(ordinal, row, temperature)
        finished: list[Completion] = []
        while self._engine.has_unfinished():
            finished += self._engine.step()
            if len(finished) >= self._settings.samples_per_batch or not self._engine.has_unfinished():
                yield len(finished)
                yield rollout_batch(finished, producer=self._name, prompts=self._prompts)
                finished = []

    def answer(self, rows: Sequence[int]) -> list[str]:
        """Greedy responses to rows of the data set, for people to read."""
        for place, row in enumerate(rows):
            request = GenerationRequest(place, 0, row, 0, self._prompt_tokens(row))
            self._engine.add(
                request, self._settings, temperature=0.0, max_tokens=self._settings.sampling.max_tokens
            )
        answers = [""] * len(rows)
        while self._engine.has_unfinished():
            for completion in self._engine.step():
                answers[completion.request.ordinal] = completion.text
        return answers

    def load_weights(self, manifest: WeightManifest, payload: WeightPayload) -> ServedVersion:
        """Load a snapshot and prove it.

        Raises:
            WeightsError: a digest or the probe does not match; the run must not go on.
        """
        from rlhf_dist.weights.certificate import prove

        started = time.monotonic()
        self._engine.load_weights(manifest, payload)
        logprobs = self._engine.prompt_logprobs(manifest.probe.tokens)
        difference = prove(self._name, manifest.version, manifest.probe, logprobs, self._tolerance_nats)
        return ServedVersion(self._name, manifest.version, difference, time.monotonic() - started)

    def _add(self, ordinal: int, row: int, temperature: float) -> None:
        tokens = self._prompt_tokens(row)
        for sample in range(self._settings.samples_per_prompt):
            request = GenerationRequest(
                ordinal, sample, row, request_seed(self._seed, ordinal, sample), tokens
            )
            self._engine.add(
                request,
                self._settings,
                temperature=temperature,
                max_tokens=min(self._settings.sampling.max_tokens, self._context_tokens - len(tokens)),
            )

    def _prompt_tokens(self, row: int) -> list[int]:
        return self._prompts["prompt_tokens"][row].as_py()


def request_seed(run_seed: int, ordinal: int, sample: int) -> int:
    """The seed of one request, the same on whichever worker and in whichever batch it runs."""
    return int(np.random.SeedSequence([run_seed, ordinal, sample]).generate_state(1)[0])
