"""`rlhf-dist bench ppo`: whole iterations of PPO beside the sum of their bare parts.

    POLICY, PROMPTS ──► a run of the main job, every response of a length given beforehand ──► its metrics
                                   |                                                              |
                                   | requests, journal                                            |
                                   v                                                              v
                        generation, scoring, learning: a process each, one after the other ──► ratio

The work is the same in every run with the same arguments, and is written down with the figures, so that
another trainer can be given it: prompts as tokens, and the length of each response.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from rlhf_dist import __version__
from rlhf_dist.bench import bare_parts
from rlhf_dist.bench.bare_parts import Request, in_own_process
from rlhf_dist.bench.iterations import Comparison, Lengths, compare, response_lengths
from rlhf_dist.bench.results_file import check_out, write_results
from rlhf_dist.bench.runs import Run
from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.rollout_worker import request_seed
from rlhf_dist.config import Config, load_config
from rlhf_dist.data.sources import read_rows
from rlhf_dist.driver.preparation import Prepared, initial_policy, prepare, role_models
from rlhf_dist.driver.run_folder import write_atomically
from rlhf_dist.engines.settings import WorkerSettings
from rlhf_dist.errors import RunError
from rlhf_dist.types import GenerationRequest

LENGTH_COLUMN = "bench_response_tokens"
PHASE_OF_PART = {"generation": "rollout", "scoring": "scoring", "learning": "learning"}
"""What the metrics of a run call the seconds that its workers spend on a part."""
LOOP = "loop"
"""Measured as the parts are, but part of one: what DeepSpeed alone takes of learning."""


@dataclass(frozen=True)
class Work:
    """A run whose responses have given lengths."""

    config: Config
    num_warmup: int
    lengths: Lengths

    @property
    def response_tokens(self) -> list[int]:
        """For each prompt of an iteration, all of which are alike in that."""
        return response_lengths(
            self.lengths,
            self.config.rollout.prompts_per_step,
            self.config.rollout.sampling.max_tokens,
            seed=self.config.run.seed,
        )


def measure_ppo(work: Work, folder: Path, *, out: Path | None, timeout_s: float, console: Console) -> None:
    """Do the run, then each part by itself; print the table, and write everything as JSON.

    Args:
        folder: an existing one, for the run.
        timeout_s: the longest that the run or a part may take.

    Raises:
        ConfigError: `out` cannot be written.
        RunError: the run failed, or a part did.
    """
    check_out(out)
    load_before = os.getloadavg()[0]
    config = _with_lengths(work, folder)
    policy = initial_policy(config, folder / "policy")
    prepared = prepare(config, policy)
    run = Run(config)
    with console.status("the whole: a run"):
        error = run.do(timeout_s=timeout_s)
    if error is not None:
        raise RunError(f"the run of the bench failed: {error}")
    bare_s = _bare_parts(work, run, policy, prepared, folder / "parts.log", timeout_s, console)
    loop_s = bare_s.pop(LOOP)
    comparison = compare(run.metrics, bare_s, loop_s, num_warmup=work.num_warmup)
    console.print(_table(comparison, work))
    if out is not None:
        write_results(out, _results(work, run, prepared, bare_s, loop_s, comparison, load_before))
        console.print(f"figures and the work itself: {out}", highlight=False)


def make_work(
    policy: str,
    prompts: str,
    overrides: Sequence[str],
    *,
    folder: Path,
    lengths: Lengths,
    response_tokens: int,
    prompts_per_step: int,
    num_epochs: int,
    num_iterations: int,
    num_warmup: int,
) -> Work:
    """The work of a bench, every setting of it checked.

    Args:
        folder: an existing one, for the run and its configuration.

    Raises:
        ConfigError: a setting cannot be used.
    """
    num_steps = num_warmup + num_iterations
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "num_steps": num_steps, "num_sample_answers": 0},
        "policy": {"model": policy},
        "reward": [{"path": "rlhf_dist.bench.iterations:vowels"}],
        "data": {"prompts": prompts},
        "rollout": {
            "num_workers": 1,
            "prompts_per_step": prompts_per_step,
            "sampling": {"max_tokens": response_tokens},
        },
        "learner": {"num_workers": 1, "zero_stage": 0},
        "algorithm": {"name": "ppo", "num_epochs": num_epochs},
        "checkpoint": {"every_steps": num_steps},
    }
    path = folder / "bench.yaml"
    write_atomically(path, yaml.safe_dump(tree, sort_keys=False))
    return Work(load_config(path, overrides), num_warmup, lengths)


def _with_lengths(work: Work, folder: Path) -> Config:
    """The run on a prompt file of its own: a row a prompt ordinal, with the length of its response."""
    config = work.config
    data, rollout = config.data, config.rollout
    rows = read_rows(data.prompts, split=data.split, config_name=data.config_name, limit=data.limit).rows
    lengths = work.response_tokens
    num_rows = config.run.num_steps * rollout.prompts_per_step
    lines = [
        json.dumps(rows[i % len(rows)] | {LENGTH_COLUMN: lengths[i % len(lengths)]}, default=str)
        for i in range(num_rows)
    ]
    path = folder / "prompts.jsonl"
    write_atomically(path, "\n".join(lines) + "\n")
    from_file = {"prompts": str(path), "shuffle": False, "over_limit": "error", "limit": None}
    sampling = rollout.sampling.model_copy(update={"min_tokens": rollout.sampling.max_tokens})
    return config.model_copy(
        update={
            "data": data.model_copy(update=from_file | {"max_response_tokens_column": LENGTH_COLUMN}),
            "rollout": rollout.model_copy(update={"sampling": sampling}),
        }
    )


def _bare_parts(
    work: Work, run: Run, policy: str, prepared: Prepared, log: Path, timeout_s: float, console: Console
) -> dict[str, list[float]]:
    """Seconds of each iteration, by part and for `LOOP`."""
    config = run.config
    models = role_models(config, policy)
    requests = _requests(work, config, prepared)
    seconds = {}
    for part, settings, arguments in (
        ("generation", config.rollout, (policy, prepared.context_tokens, requests)),
        ("scoring", config.scoring, (policy, models.reference, run.folder.journal)),
        ("learning", config.learner, (policy, models.value, run.folder.journal)),
        (LOOP, config.learner, (policy, models.value, run.folder.journal)),
    ):
        with console.status(f"the bare parts: {part}"):
            seconds[part] = in_own_process(
                getattr(bare_parts, f"{part}_seconds"),
                config,
                *arguments,
                environment=_environment(part, settings),
                log=log,
                timeout_s=timeout_s,
            )
    return seconds


def _requests(work: Work, config: Config, prepared: Prepared) -> list[list[Request]]:
    """By iteration, what the run's engines were asked for."""
    rollout, lengths = config.rollout, work.response_tokens
    tokens = prepared.prompts.table["prompt_tokens"].to_pylist()
    return [
        [
            Request(
                GenerationRequest(
                    ordinal,
                    sample,
                    row=ordinal,
                    seed=request_seed(config.run.seed, ordinal, sample),
                    prompt_tokens=tokens[ordinal],
                    submitted_at_us=0,
                    temperature=rollout.sampling.temperature_at(step, config.run.num_steps),
                ),
                lengths[ordinal % len(lengths)],
            )
            for ordinal in range(step * rollout.prompts_per_step, (step + 1) * rollout.prompts_per_step)
            for sample in range(rollout.samples_per_prompt)
        ]
        for step in range(config.run.num_steps)
    ]


def _environment(part: str, settings: WorkerSettings) -> dict[str, str]:
    """As of a role with one worker, which has all of this machine's cores."""
    num_cpus = len(os.sched_getaffinity(0))
    return RoleShare(part, 1, num_cpus, settings.gpus_per_worker, num_cpus).environment


def _table(comparison: Comparison, work: Work) -> Table:
    rollout = work.config.rollout
    table = Table(
        title=f"{rollout.prompts_per_step * rollout.samples_per_prompt} responses of {work.lengths} length, "
        f"{comparison.response_tokens} tokens; {work.config.algorithm.num_epochs} epochs",
        caption="seconds: medians of the measured iterations",
    )
    for column in ("part of an iteration", "in the run", "alone", "alone / in the run"):
        table.add_column(column, justify="left" if column.startswith("part") else "right")
    for part, phase in PHASE_OF_PART.items():
        in_run_s, alone_s = comparison.phases_s[phase], comparison.bare_s[part]
        table.add_row(part, f"{in_run_s:.3f}", f"{alone_s:.3f}", f"{alone_s / in_run_s:.2f}")
    learning_s, loop_s = comparison.phases_s["learning"], comparison.loop_s
    table.add_row(
        "learning, DeepSpeed alone", f"{learning_s:.3f}", f"{loop_s:.3f}", f"{loop_s / learning_s:.2f}"
    )
    table.add_row("weights", f"{comparison.phases_s['weights']:.3f}", "", "")
    table.add_section()
    whole = (f"{comparison.whole_s:.3f}", f"{comparison.parts_s:.3f}", f"{comparison.ratio:.2f}")
    table.add_row("whole iteration; sum of the parts", *whole)
    table.add_row(
        "response tokens a second",
        f"{comparison.tokens_per_s:,.0f}",
        f"{comparison.parts_tokens_per_s:,.0f}",
        f"{1 / comparison.ratio:.2f}",
    )
    return table


def _results(
    work: Work,
    run: Run,
    prepared: Prepared,
    bare_s: dict[str, list[float]],
    loop_s: list[float],
    comparison: Comparison,
    load_before: float,
) -> dict[str, Any]:
    derived = {
        name: getattr(comparison, name)
        for name in ("parts_s", "tokens_per_s", "parts_tokens_per_s", "ratio", "loop_ratio")
    }
    return {
        "version": __version__,
        "load_average_before": load_before,
        "settings": run.config.model_dump(mode="json"),
        "work": {
            "num_warmup": work.num_warmup,
            "prompt_tokens": prepared.prompts.table["prompt_tokens"].to_pylist(),
            "response_tokens": work.response_tokens,
        },
        "summary": asdict(comparison) | derived,
        "metrics": run.metrics,
        "bare_s": bare_s,
        "loop_s": loop_s,
    }
