"""`rlhf-dist bench pipeline`: the same run twice, generation and learning by turns, then side by side.

Two runs of the main job, with `experience.max_staleness` 0 and 1. While one goes on, this process notes what
CPU time its processes have taken by the ends of two steps.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_dist import __version__
from rlhf_dist.bench.overlap import PHASES, CpuTime, Timing, cpu_time, timing
from rlhf_dist.bench.processes import Usage, usage_of_all
from rlhf_dist.bench.results_file import check_out, write_results
from rlhf_dist.bench.runs import Run
from rlhf_dist.config import load_config
from rlhf_dist.errors import ConfigError, RunError

STALENESS = {"by turns": 0, "side by side": 1}
NUM_WARMUP = 2
POLL_S = 0.1
"""Between two looks at whether a step is done."""
TITLES = {
    "waiting": "learner waits",
    "learning": "learning",
    "weights": "weights",
    "rollout": "generation",
    "scoring": "scoring",
}


def measure_pipeline(
    config: Path,
    overrides: Sequence[str],
    *,
    num_steps: int,
    out: Path | None,
    timeout_s: float,
    console: Console,
) -> None:
    """Do both runs; print the table, and write it as JSON.

    Args:
        num_steps: of each run; the first few do not count.
        timeout_s: the longest that a run may take.

    Raises:
        ConfigError: there is no step to measure, or `out` cannot be written.
        RunError: a run failed.
    """
    if num_steps <= NUM_WARMUP:
        raise ConfigError(f"--steps={num_steps}: the first {NUM_WARMUP} do not count; do at least one more")
    check_out(out)
    load_before = os.getloadavg()[0]
    timings, metrics = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, staleness in STALENESS.items():
            forced = [
                f"run.dir={folder}/staleness-{staleness}",
                f"run.num_steps={num_steps}",
                f"experience.max_staleness={staleness}",
            ]
            run = Run(load_config(config, [*overrides, *forced]))
            watch = _CpuWatch(run, (NUM_WARMUP, num_steps))
            with console.status(f"a run, {name}"), watch:
                error = run.do(timeout_s=timeout_s)
            if error is not None:
                raise RunError(f"the run with experience.max_staleness={staleness} failed: {error}")
            metrics[name] = run.metrics
            timings[name] = timing(run.metrics, watch.between(NUM_WARMUP, num_steps), num_warmup=NUM_WARMUP)
    console.print(_table(timings))
    if out is not None:
        write_results(
            out,
            {
                "version": __version__,
                "load_average_before": load_before,
                "runs": {name: _as_json(timings[name]) | {"metrics": metrics[name]} for name in timings},
            },
        )


class _CpuWatch:
    """Notes what a run's processes have taken when it has done so many steps."""

    def __init__(self, run: Run, after_steps: Sequence[int]) -> None:
        self._run, self._awaited = run, list(after_steps)
        self._usage: dict[int, dict[int, Usage]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def between(self, first: int, last: int) -> CpuTime:
        """CPU time between the ends of two steps."""
        after = self._usage[last]
        (driver,) = [pid for pid, usage in after.items() if " rlhf_dist train " in usage.name]
        return cpu_time(self._usage[first], after, driver=driver)

    def _watch(self) -> None:
        while self._awaited and not self._ended.wait(POLL_S):
            if len(self._run.metrics) >= self._awaited[0]:
                usage = usage_of_all()
                del usage[os.getpid()]
                self._usage[self._awaited.pop(0)] = usage


def _table(timings: dict[str, Timing]) -> Table:
    columns = list(timings.values())
    steps = columns[0].num_steps
    table = Table(title=f"A step, mean of {steps}, generation and learning …", title_justify="left")
    table.add_column("")
    for name in timings:
        table.add_column(f"… {name}", justify="right")
    for phase in PHASES:
        table.add_row(f"{TITLES[phase]}, s", *(f"{each.phases_s[phase]:.3f}" for each in columns))
    table.add_section()
    table.add_row("whole step, s", *(f"{each.wall_s:.3f}" for each in columns))
    table.add_row("larger of generation and learning, s", *(f"{each.larger_s:.3f}" for each in columns))
    table.add_row("its share of the whole step", *(f"{each.hidden:.0%}" for each in columns))
    table.add_row("learner waits, share of the step", *(f"{each.bubble:.0%}" for each in columns))
    table.add_section()
    table.add_row("CPU, s", *(f"{each.cpu.all_s / each.num_steps:.3f}" for each in columns))
    table.add_row("driver's share of it", *(f"{each.cpu.driver_share:.1%}" for each in columns))
    table.add_row("queue actor's share of it", *(f"{each.cpu.queue_share:.1%}" for each in columns))
    return table


def _as_json(each: Timing) -> dict[str, Any]:
    return asdict(each) | {
        "bubble": each.bubble,
        "larger_s": each.larger_s,
        "hidden": each.hidden,
        "driver_cpu_share": each.cpu.driver_share,
        "queue_cpu_share": each.cpu.queue_share,
    }
