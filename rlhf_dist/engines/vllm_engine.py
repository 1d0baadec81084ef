"""A vLLM engine inside this process, stepped by its owner.

Consumes generation requests and weight snapshots; produces completions whose every token carries its
log-probability and the policy version that sampled it. Between two `step()` calls the owner may add
requests or load new weights; requests under way go on with the new ones.

The environment of `cluster.placement.RoleShare` must be set before vllm is imported.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from rlhf_dist.engines import vllm_weight_transfer
from rlhf_dist.errors import WeightsError
from rlhf_dist.settings import GIB
from rlhf_dist.types import (
    Completion,
    GenerationRequest,
    Link,
    PublishedWeights,
    VersionSpan,
    WeightPayload,
)

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.worker.worker_base import WorkerBase

    from rlhf_dist.engines.settings import RolloutSettings

CPU_BLOCK_TOKENS = 32
"""Of the KV cache on CPU, the fewest that its attention takes. Whole blocks of a common prompt are shared."""
PREFILL_TOKENS = 2048
"""Of a step on CPU, at least: prompts, and the responses of requests that begin anew under new weights."""


def _delete_meeting_place(worker: WorkerBase) -> None:
    """Delete the file in the temporary folder through which an engine's processes have met.

    Its removal is left to the end of the process otherwise, which a killed one does not live to see.
    """
    scheme, _, path = worker.distributed_init_method.partition("://")
    if scheme == "file":
        Path(path).unlink(missing_ok=True)


class VLLMEngine:
    """One engine: a model, its KV cache, its scheduler."""

    def __init__(self, model: str, settings: RolloutSettings, *, context_tokens: int, dtype: str) -> None:
        """Load the model and reserve the KV cache.

        Args:
            model: folder or hub name of the starting policy; its weights are version 0.
            context_tokens: prompt and response together, at most.
            dtype: torch dtype name of weights and activations.
        """
        vllm_weight_transfer.register()
        on_gpu = settings.gpus_per_worker > 0
        self.num_gpus = max(1, int(settings.gpus_per_worker)) if on_gpu else 0
        """That the model is spread over; a part of one counts as one."""
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                dtype=dtype,
                max_model_len=context_tokens,
                max_num_seqs=settings.max_num_seqs,
                enforce_eager=settings.enforce_eager or not on_gpu,
                tensor_parallel_size=max(1, self.num_gpus),
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=None if on_gpu else int(settings.cpu_kv_cache_gib * GIB),
                enable_prefix_caching=True,
                block_size=None if on_gpu else CPU_BLOCK_TOKENS,
                # For a prompt that it cuts, vLLM draws a sample and takes it back: a CPU's generators cannot.
                enable_chunked_prefill=None if on_gpu else False,
                max_num_batched_tokens=None
                if on_gpu
                else max(PREFILL_TOKENS, context_tokens) + settings.max_num_seqs,
                logprobs_mode="processed_logprobs",
                weight_transfer_config={"backend": vllm_weight_transfer.BACKEND},
                disable_log_stats=True,
                seed=0,
            )
        )
        self._engine.collective_rpc("init_weight_transfer_engine", args=({},))
        self._engine.collective_rpc(_delete_meeting_place)
        self._requests: dict[str, GenerationRequest] = {}
        self._finished_during_probe: list[Completion] = []
        self._num_added = self._num_probes = 0
        self._set_version(0)

    @property
    def version(self) -> int:
        """The policy version that the next token will be sampled from."""
        return self._version

    def add(self, request: GenerationRequest, settings: RolloutSettings, *, max_tokens: int) -> None:
        """Queue a request; it joins the running batch at the next step.

        Args:
            max_tokens: longest response, and a limit to `sampling.min_tokens`, too.
        """
        sampling = settings.sampling
        self._num_added += 1
        request_id = f"request-{self._num_added}"
        self._requests[request_id] = request
        self._engine.add_request(
            request_id,
            TokensPrompt(prompt_token_ids=request.prompt_tokens),
            SamplingParams(
                temperature=request.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=max_tokens,
                min_tokens=min(sampling.min_tokens, max_tokens),
                stop=list(sampling.stop) or None,
                seed=request.seed,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )

    def has_unfinished(self) -> bool:
        """Whether a step has anything left to return."""
        return bool(self._requests or self._finished_during_probe)

    def step(self) -> list[Completion]:
        """One engine step; returns the requests that it finished."""
        finished, self._finished_during_probe = self._finished_during_probe, []
        if self._requests:
            finished += [self._completion(output) for output in self._engine.step() if output.finished]
        return finished

    def drop_unfinished(self) -> list[GenerationRequest]:
        """Forget the requests under way, with the tokens that they have; returns them."""
        dropped = list(self._requests.values())
        self._engine.abort_request(list(self._requests))
        self._requests.clear()
        return dropped

    def load_weights(
        self,
        published: PublishedWeights,
        payload: WeightPayload | None = None,
        link: Link | None = None,
    ) -> None:
        """Verify a snapshot, load it, and drop what was cached under the old weights.

        Args:
            payload: the snapshot's bytes, where the learner is on another node.
            link: through which the learner sends them, where it is on another GPU.

        Raises:
            WeightsError: a digest does not match, and the old weights stay; or the bytes were overwritten
                while they were loaded, or damaged or cut off on a link, and the engine must not be used until
                it has loaded others.
        """
        self._engine.collective_rpc("start_weight_update")
        update = {"published": published, "payload": payload, "link": link}
        self._engine.collective_rpc("update_weights", args=(update,))
        self._engine.collective_rpc("finish_weight_update")
        self.forget_prefixes()
        self._set_version(published.manifest.version)

    def forget_prefixes(self) -> None:
        """Drop what was cached. Requests under way are preempted: they go on from their tokens, cached anew.

        Raises:
            WeightsError: vLLM kept some of it.
        """
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise WeightsError(f"the KV cache could not be cleared of policy version {self._version}")

    def prompt_logprobs(self, tokens: tuple[int, ...]) -> list[float]:
        """Log-probabilities, in nats at temperature 1, of tokens 1..n-1 given those before each."""
        self._num_probes += 1
        request_id = f"probe-{self._num_probes}"
        self._engine.add_request(
            request_id,
            TokensPrompt(prompt_token_ids=list(tokens)),
            SamplingParams(
                temperature=1.0, max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
            ),
        )
        probe: RequestOutput | None = None
        while True:
            for output in self._engine.step():
                if output.request_id == request_id:
                    probe = output
                elif output.finished:
                    self._finished_during_probe.append(self._completion(output))
            if probe is not None and probe.finished:
                entries = zip(tokens[1:], probe.prompt_logprobs[1:], strict=True)
                return [entry[token].logprob for token, entry in entries]

    def _set_version(self, version: int) -> None:
        self._version = version
        self._engine.set_weight_version(str(version))

    def _completion(self, output: RequestOutput) -> Completion:
        request = self._requests.pop(output.request_id)
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(tokens, answer.logprobs, strict=True)]
        return Completion(
            request=request,
            text=answer.text,
            tokens=tokens,
            logprobs=logprobs,
            version_spans=_version_spans(answer) or (VersionSpan(self._version, 0, 0),),
            finish_reason=answer.finish_reason,
            finished_at_us=time.time_ns() // 1000,
        )


def _version_spans(answer: CompletionOutput) -> tuple[VersionSpan, ...]:
    return tuple(VersionSpan(int(span.version), span.start, span.end) for span in answer.weight_versions)
