"""The parts of an iteration by themselves: one process each, the engines' own classes, nothing else.

No Ray, no queue, no journal, no weights on the way: what the parts take here is what the whole would take if
putting them together were free. A part's process imports this file before its environment is set, so that
nothing on top of it may load torch.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlhf_dist.cluster.process_group import free_port
from rlhf_dist.errors import DeadlineError, WorkerError

if TYPE_CHECKING:
    import pyarrow as pa

    from rlhf_dist.config import Config
    from rlhf_dist.types import GenerationRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One response to generate."""

    request: GenerationRequest
    num_tokens: int
    """It gets exactly so many."""


def in_own_process(
    part: Callable[..., T], *arguments: object, environment: dict[str, str], log: Path, timeout_s: float
) -> T:
    """Call a part in a new process and wait for what it returns.

    Args:
        environment: set before anything but this file is imported there.
        log: gets what the process prints.

    Raises:
        DeadlineError: it took longer; the process is killed.
        WorkerError: the process died.
    """
    name = part.__name__.removesuffix("_seconds")
    with ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(environment, str(log)),
    ) as process:
        try:
            return process.submit(part, *arguments).result(timeout_s)
        except BaseException as error:  # Ctrl-C, too: the block would wait for the process to end by itself
            for child in multiprocessing.active_children():
                child.kill()
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"the bare part {name!r} did not end within {timeout_s:g} s") from error
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    f"the process of the bare part {name!r} died; its last words: {_last_line(log)}"
                ) from error
            raise


def generation_seconds(
    config: Config, policy: str, context_tokens: int, iterations: Sequence[Sequence[Request]]
) -> list[float]:
    """One vLLM engine, given an iteration's requests at once."""
    from rlhf_dist.engines.loading import torch_dtype
    from rlhf_dist.engines.vllm_engine import VLLMEngine

    dtype = torch_dtype(config.rollout.dtype, on_gpu=config.rollout.gpus_per_worker > 0)
    engine = VLLMEngine(
        policy, config.rollout, context_tokens=context_tokens, dtype=str(dtype).removeprefix("torch.")
    )
    seconds = []
    for requests in iterations:
        engine.forget_prefixes()  # as new weights make it
        started = time.monotonic()
        for each in requests:
            engine.add(each.request, config.rollout, max_tokens=each.num_tokens)
        num_tokens = 0
        while engine.has_unfinished():
            num_tokens += sum(len(completion.tokens) for completion in engine.step())
        seconds.append(time.monotonic() - started)
        assert num_tokens == sum(each.num_tokens for each in requests)
    return seconds


def scoring_seconds(config: Config, policy: str, reference: str | None, journal: Path) -> list[float]:
    """Rewards and reference log-probabilities of each step's samples at once."""
    import torch

    from rlhf_dist.engines.loading import torch_dtype
    from rlhf_dist.engines.scorer_engine import ForwardPasses, ScorerEngine
    from rlhf_dist.experience.schema import ROLLOUT_SCHEMA

    on_gpu = config.scoring.gpus_per_worker > 0
    engine = ScorerEngine(
        config.reward,
        reference_model=reference,
        policy_model=policy,
        forward=ForwardPasses(
            config.scoring.max_tokens_per_micro_batch,
            config.scoring.batching,
            torch_dtype(config.scoring.dtype, on_gpu=on_gpu),
            torch.device("cuda" if on_gpu else "cpu"),
        ),
    )
    seconds = []
    for step in range(config.run.num_steps):
        rollouts = _one_batch(_batches(journal, step)).select(ROLLOUT_SCHEMA.names)
        temperature = config.rollout.sampling.temperature_at(step, config.run.num_steps)
        started = time.monotonic()
        engine.score(rollouts, temperature=temperature, scorer="bench")
        seconds.append(time.monotonic() - started)
    return seconds


def learning_seconds(config: Config, policy: str, value: str | None, journal: Path) -> list[float]:
    """One learner rank, given each step's samples: old log-probabilities and values, then the epochs."""
    from rlhf_dist.algorithms import make_algorithm
    from rlhf_dist.engines.collectives import leave_group
    from rlhf_dist.engines.learner import Learner
    from rlhf_dist.engines.loading import torch_dtype
    from rlhf_dist.experience.samples import Samples

    _join_alone(config)
    learner = Learner(
        config.learner,
        make_algorithm(config.algorithm),
        policy_model=policy,
        value_model=value,
        num_steps=config.run.num_steps,
        dtype=torch_dtype(config.learner.dtype, on_gpu=config.learner.gpus_per_worker > 0),
        seed=config.run.seed,
    )
    seconds = []
    for step in range(config.run.num_steps):
        samples = Samples.from_batches(_batches(journal, step))
        temperature = config.rollout.sampling.temperature_at(step, config.run.num_steps)
        started = time.monotonic()
        learner.step(samples, step=step, temperature=temperature)
        seconds.append(time.monotonic() - started)
    leave_group()
    return seconds


def loop_seconds(config: Config, policy: str, value: str | None, journal: Path) -> list[float]:
    """Of `learning_seconds` what DeepSpeed alone takes."""
    from rlhf_dist.bench.bare_loop import BareLoop
    from rlhf_dist.engines.collectives import leave_group
    from rlhf_dist.experience.samples import Samples

    _join_alone(config)
    loop = BareLoop(config, policy_model=policy, value_model=value)
    seconds = [
        loop.step_seconds(
            Samples.from_batches(_batches(journal, step)),
            step=step,
            temperature=config.rollout.sampling.temperature_at(step, config.run.num_steps),
        )
        for step in range(config.run.num_steps)
    ]
    leave_group()
    return seconds


def _begin(environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _join_alone(config: Config) -> None:
    """A process group of this process."""
    from rlhf_dist.engines.collectives import join_group

    join_group(
        "127.0.0.1",
        free_port(),
        rank=0,
        num_ranks=1,
        on_gpu=config.learner.gpus_per_worker > 0,
        timeout_s=config.cluster.step_timeout_s,
    )


def _batches(journal: Path, step: int) -> list[pa.RecordBatch]:
    """What a run's learner had in a step."""
    from rlhf_dist.experience.journal import JournalReader
    from rlhf_dist.experience.steps import read_history

    return JournalReader(journal).read_rows(read_history(journal).steps[step].samples)


def _one_batch(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    import pyarrow as pa

    (batch,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return batch


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "none"
