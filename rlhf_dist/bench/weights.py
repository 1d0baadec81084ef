"""`rlhf-dist bench weights`: from the learner's weights to every engine serving them, against a memcpy.

Real parts only: a DeepSpeed learner rank publishes an untrained model, rollout workers load it into vLLM and
prove it. A memcpy of as many bytes is timed in between, so that both see the same load of the machine: by one
thread, or within the GPU's memory for snapshots that are there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from rlhf_dist import algorithms
from rlhf_dist.bench.results_file import check_out, write_results
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.placement import share_out
from rlhf_dist.cluster.rollout_pool import RolloutPool
from rlhf_dist.cluster.session import cpus_of_smallest_node, ray_session
from rlhf_dist.config import ClusterSettings
from rlhf_dist.engines.loading import torch_dtype, vocabulary_size
from rlhf_dist.engines.settings import LearnerSettings, RolloutSettings
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm
from rlhf_dist.types import DeviceAddress, ServedVersion, Transport
from rlhf_dist.weights.certificate import TOLERANCE_NATS, probe_tokens

MB = 1e6
CONTEXT_TOKENS = 64
KV_CACHE_GIB = 0.1
GPU_MEMORY_SHARE = 0.2
"""Of the GPU, for each engine: what a snapshot of some GB and a small cache need."""
WARM_UP_ROUNDS = 4
"""Both segments are mapped in the first two, and the engine's allocator knows its sizes after two more."""
MEMCPY_BUFFER_BYTES = 256_000_000
"""Larger sizes are copied piece by piece; it is many times a core's cache."""
TOLERANCE_FACTOR = 10
"""An untrained model is not used to its rounding: in bfloat16 it differs by 0.2 nats at a width of 2048."""
ELEMENTS_PER_LAYER = 13
"""Of a layer of `save_tiny_causal_lm` for each squared unit of its width: attention 4, MLP 9."""
HIDDEN_SIZES = (64, 128, 256, 512, 1024, 2048)
MIN_LAYERS = 3


@dataclass(frozen=True)
class Round:
    """Seconds of one publication."""

    memcpy_s: float
    """A copy of as many bytes by one thread, buffers warm."""
    learner_write_s: float
    """The learner gathers, copies and digests."""
    learner_probe_s: float
    """The learner's forward pass over the probe; with the above its stall."""
    load_s: float
    """The slowest worker verifies the digests and loads."""
    worker_probe_s: float
    """The slowest worker answers the probe."""
    total_s: float
    """From the call of the learner until the last worker has proved the version."""


@dataclass(frozen=True)
class Case:
    """Medians over the rounds of one size and number of workers."""

    num_bytes: int
    num_workers: int
    median: Round
    rounds: list[Round]


def measure_weights(
    cases: Sequence[tuple[int, int]],
    *,
    rounds: int,
    gpus_per_worker: float,
    transport: Transport,
    out: Path | None,
    console: Console,
    verbose: bool,
) -> None:
    """Measure each case in workers of its own; print a table, and write it as JSON.

    What fails leaves the cases before it in both.

    Args:
        cases: (size in MB, number of workers).
        rounds: measured publications of each.
        gpus_per_worker: of the learner and of each rollout worker; 0 is float32 on CPU, else bfloat16.

    Raises:
        ConfigError: `out` cannot be written.
    """
    check_out(out)
    dtype = torch_dtype(None, on_gpu=gpus_per_worker > 0)
    table = _empty_table()
    results: list[Case] = []
    try:
        for size_mb, num_workers in cases:
            with (
                console.status(f"{size_mb} MB, {num_workers} workers"),
                tempfile.TemporaryDirectory() as folder,
                ray_session(None, verbose=verbose),
            ):
                _write_model(Path(folder), size_mb, dtype)
                results.append(_measure(folder, num_workers, rounds, gpus_per_worker, transport))
            table.add_row(*_row(results[-1]))
            if out is not None:
                write_results(out, [asdict(result) for result in results])
    finally:
        if results:
            console.print(table)


def _write_model(folder: Path, size_mb: int, dtype: torch.dtype) -> None:
    """An untrained model of about this size, of few wide layers rather than many narrow ones."""
    num_elements = size_mb * MB / dtype.itemsize
    fitting = [each for each in HIDDEN_SIZES if MIN_LAYERS * ELEMENTS_PER_LAYER * each**2 <= num_elements]
    hidden_size = max(fitting, default=min(HIDDEN_SIZES))
    num_layers = max(1, round(num_elements / (ELEMENTS_PER_LAYER * hidden_size**2)))
    save_tiny_causal_lm(
        folder, ["a few words"], seed=0, hidden_size=hidden_size, num_layers=num_layers, max_positions=256
    )


def _measure(
    model: str, num_workers: int, num_rounds: int, gpus_per_worker: float, transport: Transport
) -> Case:
    """Start a learner rank and the rollout workers, and publish again and again."""
    on_gpu = gpus_per_worker > 0
    learner_settings = LearnerSettings(num_workers=1, zero_stage=0, gpus_per_worker=gpus_per_worker)
    rollout_settings = RolloutSettings(
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
        cpu_kv_cache_gib=KV_CACHE_GIB,
        gpu_memory_utilization=GPU_MEMORY_SHARE,
        enforce_eager=True,
    )
    dtype_name = str(torch_dtype(None, on_gpu=on_gpu)).removeprefix("torch.")
    learner_share, rollout_share = share_out(
        {"learner": learner_settings, "rollout": rollout_settings}, node_cpus=cpus_of_smallest_node()
    )
    cluster = ClusterSettings()
    learner = LearnerGroup(learner_share, cluster)
    rollout = RolloutPool(
        rollout_settings,
        rollout_share,
        cluster,
        pa.table({"prompt_tokens": [[1, 2, 3]], "max_response_tokens": pa.array([None], pa.int32())}),
        model=model,
        dtype=dtype_name,
        context_tokens=CONTEXT_TOKENS,
        probe_tolerance_nats=TOLERANCE_FACTOR * TOLERANCE_NATS[dtype_name],
        seed=0,
        deterministic=False,
        transport=transport,
    )
    try:
        events, started = Events(), list[int]()
        for index in range(len(rollout)):
            rollout.start(events, index, partial(started.append, index))
        learner.start(
            events,
            learner_settings,
            algorithms.settings_class("reinforce")(name="reinforce"),
            policy_model=model,
            value_model=None,
            num_steps=1,
            seed=0,
            journal=Path(model),
            snapshots_on_gpu=on_gpu and transport != "shared_memory",
        )
        events.wait_until(lambda: len(started) == len(rollout))
        probe = probe_tokens(vocabulary_size(model), CONTEXT_TOKENS)
        measured = [
            _round(learner, rollout, version, probe) for version in range(WARM_UP_ROUNDS + num_rounds)
        ][WARM_UP_ROUNDS:]
    finally:
        rollout.end()
        learner.end()
    num_bytes = measured[0][1]
    rounds = [each for each, _ in measured]
    median = Round(
        **{
            field.name: statistics.median(getattr(each, field.name) for each in rounds)
            for field in fields(Round)
        }
    )
    return Case(num_bytes, num_workers, median, rounds)


def _round(
    learner: LearnerGroup, rollout: RolloutPool, version: int, probe: tuple[int, ...]
) -> tuple[Round, int]:
    """Publish once; returns the seconds and the bytes."""
    started = time.monotonic()
    events, served = Events(), list[ServedVersion]()
    published = learner.publish(events, version, probe)
    rollout.load_weights(events, published, served.append)
    events.wait_until(lambda: len(served) == len(rollout))
    total_s = time.monotonic() - started
    num_bytes = published.segment.num_bytes
    measured = Round(
        memcpy_s=memcpy_seconds(num_bytes, on_gpu=isinstance(published.segment, DeviceAddress)),
        learner_write_s=published.write_s,
        learner_probe_s=published.probe_s,
        load_s=max(proof.load_s for proof in served),
        worker_probe_s=max(proof.probe_s for proof in served),
        total_s=total_s,
    )
    return measured, num_bytes


def memcpy_seconds(num_bytes: int, *, on_gpu: bool) -> float:
    """How long one thread, or the GPU, copies so many bytes between buffers that are in memory already."""
    buffer_bytes = min(num_bytes, MEMCPY_BUFFER_BYTES)
    device = torch.device("cuda" if on_gpu else "cpu")
    source, target = (torch.ones(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    with _one_thread():
        target.copy_(source)
        wait_for_device = torch.cuda.synchronize if on_gpu else lambda: None
        wait_for_device()
        started = time.monotonic()
        for begin in range(0, num_bytes, buffer_bytes):
            size = min(buffer_bytes, num_bytes - begin)
            target[:size].copy_(source[:size])
        wait_for_device()
        return time.monotonic() - started


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _empty_table() -> Table:
    table = Table(title="New weights, from the learner to every engine")
    table.add_column("MB", justify="right")
    table.add_column("workers", justify="right")
    table.add_column("memcpy", justify="right")
    for name in ("learner:\nwrite", "\nprobe", "worker:\nload", "\nprobe"):
        table.add_column(name, justify="right")
    table.add_column("publish\nto serving", justify="right")
    table.add_column("for each\nworker", justify="right")
    table.caption = "times the memcpy"
    return table


def _row(case: Case) -> list[str]:
    seconds = case.median

    def ratio(value_s: float) -> str:
        return f"{value_s / seconds.memcpy_s:.1f}"

    return [
        f"{case.num_bytes / MB:,.0f}",
        str(case.num_workers),
        f"{1e3 * seconds.memcpy_s:,.1f} ms",
        ratio(seconds.learner_write_s),
        ratio(seconds.learner_probe_s),
        ratio(seconds.load_s),
        ratio(seconds.worker_probe_s),
        f"{1e3 * seconds.total_s:,.0f} ms",
        ratio(seconds.total_s / case.num_workers),
    ]
