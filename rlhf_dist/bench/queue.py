"""`rlhf-dist bench queue`: experience from scoring workers through the queue to a learner rank.

    Producer x N ──► journal, object store ──► ExperienceQueue ──► Reader
    (batches as a scoring worker has them)     (bounded small)     (lease, read, build `Samples`)

The real queue actor, ledger, log of steps and journal; the producers only skip the models and the reader the
learner's step, so whatever limits here is the experience's own way. This process does what the driver does.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_dist import __version__
from rlhf_dist.bench.processes import is_actor, usage_of_all
from rlhf_dist.bench.queue_figures import Memory, Speeds, Window, growth, speeds
from rlhf_dist.bench.queue_workers import Producer, Reader
from rlhf_dist.bench.results_file import check_out, write_results
from rlhf_dist.cluster.calls import Call, wait_for_all
from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.experience_queue import ExperienceQueue, QueueClient
from rlhf_dist.cluster.liveness import Worker
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.cluster.workers import Workers
from rlhf_dist.data.prompts import PROMPT_SCHEMA, PromptOrder
from rlhf_dist.experience.dispatch import WorkerLoad
from rlhf_dist.experience.settings import ExperienceSettings, JournalSettings
from rlhf_dist.types import BatchInfo, PromptAttempt

CALL_TIMEOUT_S = 120
BATCHES_PER_STEP = 8
STEPS_IN_QUEUE = 2
"""The queue's bound: producers that are faster than the reader wait."""
BATCHES_AHEAD = 2
"""That each producer may have under way or waiting for room."""
STEPS_AHEAD = 64
"""`experience.max_staleness`: only the queue's bound is to hold producers back."""
CHECKPOINT_EVERY = 200
"""Steps between two words that the journal may be compacted."""
JOURNAL_GIB = 2.0
"""The journal's limit on disk, for long runs."""
WARM_UP_STEPS = 20
READINGS = 30
MEMORY_EVERY_S = 10
SOAK_WARM_UP_S = 60
NO_END = 2**31
GB = 1e9
MB = 1e6
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """What the producers send."""

    samples_per_batch: int
    response_tokens: int
    """Of the longest response; a response has half of it on average."""


@dataclass(frozen=True)
class Case:
    """One number of producers."""

    num_producers: int
    window: Window
    speeds: Speeds


def measure_queue(
    producers: Sequence[int],
    sizes: Sizes,
    *,
    seconds: float,
    soak_s: float,
    out: Path | None,
    console: Console,
    verbose: bool,
) -> None:
    """Measure each number of producers, then the last one for `soak_s`; print, and write as JSON.

    Args:
        seconds: of each measurement.
        soak_s: 0 for none.

    Raises:
        ConfigError: `out` cannot be written.
    """
    check_out(out)
    load_before = os.getloadavg()[0]
    cases, soak = [], None
    with ray_session(None, verbose=verbose):
        for count in producers:
            with console.status(f"{count} producers"):
                cases.append(_measure(count, sizes, seconds))
        if soak_s > 0:
            with console.status(f"{producers[-1]} producers for {soak_s:.0f} s"):
                soak = _measure(producers[-1], sizes, soak_s)
    console.print(_table(cases, sizes))
    if soak is not None:
        console.print(_soak_text(soak), highlight=False)
    if out is not None:
        write_results(
            out,
            {
                "version": __version__,
                "load_average_before": load_before,
                "sizes": asdict(sizes),
                "cases": [_as_json(case) for case in cases],
                "soak": soak and _as_json(soak),
            },
        )


def _measure(num_producers: int, sizes: Sizes, seconds: float) -> Case:
    """In actors and a journal of its own."""
    samples_per_step = BATCHES_PER_STEP * sizes.samples_per_batch
    settings = ExperienceSettings(
        max_samples=STEPS_IN_QUEUE * samples_per_step,
        max_staleness=STEPS_AHEAD,
        journal=JournalSettings(max_gib=JOURNAL_GIB),
    )
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder)
        queue = QueueClient(
            settings,
            journal,
            first_step=0,
            num_steps=NO_END,
            prompts_per_step=samples_per_step,
            samples_per_prompt=1,
            in_order=False,
            prompts=PROMPT_SCHEMA.empty_table(),
            order=PromptOrder(1, 0, False),
        )
        producers = _workers(
            Producer,
            num_producers,
            lambda index: (
                (f"producer {index}", journal),
                {"segment_bytes": settings.journal.segment_bytes},
            ),
        )
        reader = _workers(Reader, 1, lambda _: ((journal,), {}))
        try:
            started = [queue.start(), *reader.start(action="import what it needs")]
            started += producers.start(*astuple(sizes), action="make its batches")
            wait_for_all(started, CALL_TIMEOUT_S)
            events = Events()
            feed = _Feed(events, queue, producers, sizes.samples_per_batch)
            steps = _Steps(events, queue, reader, feed)
            return Case(num_producers, steps.window(seconds), steps.speeds())
        finally:
            for each in (producers, reader, queue):
                each.end()


def _workers(
    worker_class: type[Worker], count: int, arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
) -> Workers:
    """Actors that reserve next to nothing: what they may use is the machine's to say."""
    share = RoleShare(worker_class.__name__.lower(), count, cpus=0.01, gpus=0, threads=1)
    return Workers(worker_class, share, placement_timeout_s=CALL_TIMEOUT_S, arguments=arguments)


class _Feed:
    """Keeps every producer at work: what the queue hands out is made into batches, and those are put."""

    def __init__(
        self, events: Events, queue: QueueClient, producers: Workers, samples_per_batch: int
    ) -> None:
        self._events, self._queue, self._producers = events, queue, producers
        self._samples_per_batch = samples_per_batch
        self._free = [BATCHES_AHEAD] * len(producers)
        self._asking = self._ended = False
        self._version = 0
        self.num_producing = self.num_puts = 0
        self.put_s = 0.0

    def go_on(self, version: int) -> None:
        """This policy version is served now; whoever is free gets prompts."""
        self._version = version
        self._hand_out()

    def end(self) -> None:
        """No more prompts."""
        self._ended = True

    def _hand_out(self) -> None:
        loads = [
            WorkerLoad(index, num_tokens=0, tokens_per_prompt=1, room=free * self._samples_per_batch)
            for index, free in enumerate(self._free)
            if free
        ]
        if loads and not self._asking and not self._ended:
            self._asking = True
            self._events.expect(self._queue.dispatch(loads, self._version), self._on_prompts, CALL_TIMEOUT_S)

    def _on_prompts(self, handed_out: dict[int, list[PromptAttempt]]) -> None:
        self._asking = False
        for index, attempts in handed_out.items():
            for begin in range(0, len(attempts), self._samples_per_batch):
                self._produce(index, attempts[begin : begin + self._samples_per_batch])
        if handed_out:
            self._hand_out()

    def _produce(self, index: int, attempts: Sequence[PromptAttempt]) -> None:
        self._free[index] -= 1
        self.num_producing += 1
        ordinals = [attempt.ordinal for attempt in attempts]
        produce = self._producers.actors[index].produce.options(num_returns=2)
        batch, info = produce.remote(ordinals, self._version)
        call = Call(info, self._producers.name(index), "make a batch")
        self._events.expect(call, partial(self._on_batch, index, batch), CALL_TIMEOUT_S)

    def _on_batch(self, index: int, batch: Any, info: BatchInfo) -> None:
        self.num_producing -= 1
        then = partial(self._on_put, index, time.monotonic())
        self._events.expect(self._queue.put(batch, info), then, CALL_TIMEOUT_S)

    def _on_put(self, index: int, called_at: float, _: None) -> None:
        self.put_s += time.monotonic() - called_at
        self.num_puts += 1
        self._free[index] += 1
        self._hand_out()


class _Steps:
    """What a driver does of learner steps that only read: lease, read, acknowledge."""

    def __init__(self, events: Events, queue: QueueClient, reader: Workers, feed: _Feed) -> None:
        self._events, self._queue, self._reader, self._feed = events, queue, reader, feed
        self._num_done = self._num_samples = self._num_bytes = 0

    def window(self, seconds: float) -> Window:
        """Steps for some time, after a few that do not count."""
        self._feed.go_on(version=0)
        while self._num_done < WARM_UP_STEPS:
            self._step()
        began, memory = time.monotonic(), [_memory(0.0)]
        samples, num_bytes = self._num_samples, self._num_bytes
        puts, put_s = self._feed.num_puts, self._feed.put_s
        while (passed_s := time.monotonic() - began) < seconds:
            if passed_s >= len(memory) * MEMORY_EVERY_S:
                memory.append(_memory(passed_s))
            self._step()
        passed_s = time.monotonic() - began
        return Window(
            seconds=passed_s,
            num_samples=self._num_samples - samples,
            num_bytes=self._num_bytes - num_bytes,
            num_puts=self._feed.num_puts - puts,
            put_s=self._feed.put_s - put_s,
            memory=(*memory, _memory(passed_s)),
        )

    def speeds(self) -> Speeds:
        """Of reading one more step, while nobody produces. The last thing that is measured."""
        lease = self._events.wait_for(self._queue.lease(self._num_done), CALL_TIMEOUT_S)
        self._feed.end()
        self._events.wait_until(lambda: self._feed.num_producing == 0)
        call = self._reader.call(0, "compare", lease.batches, READINGS, action="read a step repeatedly")
        return speeds(self._events.wait_for(call, CALL_TIMEOUT_S))

    def _step(self) -> None:
        lease = self._events.wait_for(self._queue.lease(self._num_done), CALL_TIMEOUT_S)
        call = self._reader.call(0, "read", lease.batches, action="read a step")
        self._num_bytes += self._events.wait_for(call, CALL_TIMEOUT_S)
        self._events.wait_for(self._queue.acknowledge(lease, policy_digest="none"), CALL_TIMEOUT_S)
        self._num_samples += lease.num_samples
        self._num_done += 1
        if self._num_done % CHECKPOINT_EVERY == 0:
            self._events.expect(self._queue.checkpointed(self._num_done), lambda _: None, CALL_TIMEOUT_S)
        self._feed.go_on(version=self._num_done)


def _memory(at_s: float) -> Memory:
    usage = usage_of_all()
    (queue,) = [each.rss_bytes for each in usage.values() if is_actor(each, ExperienceQueue.__name__)]
    return Memory(at_s, queue=queue, driver=usage[os.getpid()].rss_bytes)


def _table(cases: Sequence[Case], sizes: Sizes) -> Table:
    table = Table(
        title=f"{sizes.samples_per_batch} samples a batch, responses of up to {sizes.response_tokens} tokens",
        caption="put: until there was room; memory: resident, and what came to it",
        box=box.SIMPLE_HEAD,  # nine columns in 80 characters
    )
    for column in (
        "producers",
        "samples/s",
        "MB/s",
        "put,\nms",
        "read,\nGB/s",
        "copy,\nGB/s",
        "read /\ncopy",
        "queue,\nMiB",
        "driver,\nMiB",
    ):
        table.add_column(column, justify="right")
    for case in cases:
        window, first, last = case.window, case.window.memory[0], case.window.memory[-1]
        table.add_row(
            str(case.num_producers),
            f"{window.samples_per_s:,.0f}",
            f"{window.bytes_per_s / MB:.1f}",
            f"{1e3 * window.mean_put_s:.1f}",
            f"{case.speeds.read / GB:.2f}",
            f"{case.speeds.memcpy / GB:.2f}",
            f"{case.speeds.ratio:.2f}",
            f"{first.queue / MIB:.0f} {(last.queue - first.queue) / MIB:+.0f}",
            f"{first.driver / MIB:.0f} {(last.driver - first.driver) / MIB:+.0f}",
        )
    return table


def _soak_text(soak: Case) -> str:
    queue, driver = _growth(soak)
    return (
        f"{soak.num_producers} producers for {soak.window.seconds / 60:.0f} min: "
        f"{soak.window.samples_per_s:,.0f} samples/s; memory at most, less what it was after the warm-up: "
        f"queue actor {queue / MIB:.1f} MiB, driver {driver / MIB:.1f} MiB"
    )


def _growth(case: Case) -> tuple[int, int]:
    return growth(case.window.memory, warm_up_s=min(SOAK_WARM_UP_S, case.window.seconds / 2))


def _as_json(case: Case) -> dict[str, Any]:
    queue, driver = _growth(case)
    window, ratio = case.window, case.speeds.ratio
    return asdict(case) | {
        "samples_per_s": window.samples_per_s,
        "bytes_per_s": window.bytes_per_s,
        "mean_put_s": window.mean_put_s,
        "read_to_memcpy": ratio,
        "growth_bytes": {"queue": queue, "driver": driver},
    }
