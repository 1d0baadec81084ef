"""`rlhf-dist bench algorithms`: reward against samples used, of every algorithm, over seeds.

    CONFIG, tuning, overrides
         |                           once a seed, where CONFIG has a section `sft`
         |---> start/seed-S  (supervised stage and one step) ---> the policy that all start from
         |                                                              |
         '---> runs/ALGORITHM/seed-S  (the main job, a process each) <--'
                       |
                       '---> table.md, curves.png, results.json

Runs of a seed draw the same prompts, with the same sampling seeds, and start from the same policy: their
first steps have the same rewards. A run that is complete in the folder is not done again.
"""

from __future__ import annotations

import difflib
import importlib.util
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from rlhf_dist import __version__
from rlhf_dist.algorithms import algorithm_names, make_algorithm, settings_class
from rlhf_dist.bench.curves import Curve, Spread, Summary, final_reward, summarize
from rlhf_dist.bench.runs import Run
from rlhf_dist.config import Config, load_config
from rlhf_dist.driver.preparation import check_inputs
from rlhf_dist.driver.run_folder import owned_folder, write_atomically, write_json
from rlhf_dist.errors import ConfigError, RunError
from rlhf_dist.settings import Section

MARKER = ".rlhf-dist-bench"
START_ALGORITHM = "reinforce"
"""Of the run that is done for its supervised stage: no value model, and no demand on the prompts."""
PER_ALGORITHM = ("algorithm", "learner")
"""Sections that may differ between algorithms. Prompts, samples and their number may not."""


class Tuning(Section):
    """Overrides, each as on the command line: `learner.policy_optimizer.learning_rate=1e-3`."""

    common: tuple[str, ...] = ()
    """For every run."""
    per_algorithm: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """For the runs of one algorithm, after the common ones."""


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    starts: dict[int, Run]
    """By seed, the run whose supervised stage makes the starting policy; none without such a stage."""
    runs: dict[tuple[str, int], Run]
    """By algorithm and seed, in the order in which they are done."""


@dataclass(frozen=True)
class Result:
    """What a run came to: a curve or an error."""

    seed: int
    curve: Curve | None
    error: str | None


def compare_algorithms(
    plan: Plan, folder: Path, *, reward: float, timeout_s: float, console: Console
) -> None:
    """Do the runs that are not done yet, and write and print what all of them come to.

    Args:
        reward: what the samples to reach are counted for.
        timeout_s: the longest that one run may take.

    Raises:
        ConfigError: the folder is not a bench's, or holds runs with other settings.
        RunError: a supervised stage failed; or, after the comparison of the others, a run did.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("the plot needs matplotlib, which is not installed: pip install matplotlib")
    with owned_folder(folder, kind="bench", marker=folder / MARKER, remedy="set --out"):
        everything = [*plan.starts.values(), *plan.runs.values()]
        for run in everything:
            run.check()
        check_inputs(everything[0].config)
        results = _results(plan, timeout_s, console)
        summaries = {
            name: summarize([result.curve for result in of_name], reward=reward)
            for name, of_name in results.items()
        }
        _write(folder, plan, results, summaries, reward)
    rows = table_rows(summaries, reward)
    console.print(_rich_table(rows))
    console.print(f"results: {folder}", highlight=False)
    failed = [f"{name}, seed {result.seed}" for name in results for result in results[name] if result.error]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(plan.runs)} runs failed: {'; '.join(failed)}; their logs are in "
            f"{folder / 'runs'}, and the same command does them again"
        )


def make_plan(
    config: Path,
    overrides: Sequence[str],
    *,
    tuning: Tuning,
    algorithms: Iterable[str],
    num_seeds: int,
    folder: Path,
) -> Plan:
    """The runs of a comparison, every setting of them checked.

    The section `algorithm` of CONFIG does not count: each algorithm starts from its own defaults. Seeds are
    CONFIG's and those after it. `overrides` come last, and are for all runs.

    Args:
        folder: absolute.

    Raises:
        ConfigError: an algorithm is not known, or a setting cannot be used.
    """
    names = list(dict.fromkeys(algorithms))
    _check_names(names)
    _check_overrides(overrides, tuning)
    common = (*tuning.common, *overrides)
    base = load_config(config, [*common, f"algorithm={{name: {START_ALGORITHM}}}", "run.num_steps=1"])
    seeds = range(base.run.seed, base.run.seed + num_seeds)
    starts = {seed: _placed(base, seed, folder / "start") for seed in seeds} if base.sft is not None else {}
    settings = {
        name: load_config(
            config,
            [
                f"algorithm={{name: {name}}}",
                *tuning.common,
                *tuning.per_algorithm.get(name, ()),
                *overrides,
            ],
        )
        for name in names
    }
    runs = {
        (name, seed): _placed(_started_from(settings[name], starts.get(seed)), seed, folder / "runs" / name)
        for seed in seeds
        for name in names
    }
    return Plan(starts, runs)


def read_tuning(path: Path) -> Tuning:
    """Read a tuning file: `common`, a list of overrides, and `per_algorithm`, such a list by name.

    Raises:
        ConfigError: the file is missing or broken, or names something that is not known.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"tuning file {path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return Tuning.model_validate(tree)
    except ValidationError as error:
        problems = [".".join(map(str, one["loc"])) or "the file" for one in error.errors()]
        raise ConfigError(
            f"tuning file {path} cannot be used, because of {', '.join(problems)}: it has a list of "
            "overrides (- section.key=value) under `common`, and one under each name in `per_algorithm`"
        ) from error


def table_rows(summaries: Mapping[str, Summary], reward: float) -> list[tuple[str, ...]]:
    """The table, its header first; the algorithm with the highest mean reward on top."""
    header = (
        "algorithm",
        "value model",
        f"samples to reward {reward:g}",
        "mean reward",
        "final reward",
        "final, worst seed",
        "failed",
        "degenerate",
    )
    return [header, *(_row(name, summaries[name]) for name in _ranked(summaries))]


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table for a page of the documentation."""
    lines = [rows[0], ("---",) * len(rows[0]), *((f"`{name}`", *rest) for name, *rest in rows[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _check_names(names: Iterable[str]) -> None:
    known = algorithm_names()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"algorithm {name!r} is not known; {hint}")


def _check_overrides(overrides: Sequence[str], tuning: Tuning) -> None:
    _check_names(tuning.per_algorithm)
    taken = {
        "algorithm": "--algorithms says what is compared",
        "algorithm.name": "--algorithms says what is compared",
        "run.dir": "--out says where the runs go",
    }
    own = [(name, one) for name, several in tuning.per_algorithm.items() for one in several]
    for override in (*overrides, *tuning.common, *(one for _, one in own)):
        key = override.partition("=")[0]
        if key in taken:
            raise ConfigError(f"override {override!r}: {taken[key]}; leave it out")
    for name, override in own:
        if override.partition("=")[0].split(".")[0] not in PER_ALGORITHM:
            raise ConfigError(
                f"override {override!r} of {name}: algorithms may differ in their sections "
                f"{' and '.join(PER_ALGORITHM)} only, or they would not see the same samples; set it for all"
            )


def _placed(config: Config, seed: int, folder: Path) -> Run:
    run = config.run.model_copy(update={"seed": seed, "dir": folder / f"seed-{seed}"})
    return Run(config.model_copy(update={"run": run}))


def _started_from(config: Config, start: Run | None) -> Config:
    if start is None:
        return config
    policy = config.policy.model_copy(update={"model": str(start.folder.sft_policy)})
    return config.model_copy(update={"policy": policy, "sft": None})


def _results(plan: Plan, timeout_s: float, console: Console) -> dict[str, list[Result]]:
    """Of each algorithm, by seed."""
    for seed, start in plan.starts.items():
        error = _done(start, f"supervised stage, seed {seed}", timeout_s, console)
        if error is not None:
            raise RunError(f"the supervised stage of seed {seed} failed: {error}; its log is {start.log}")
    results: dict[str, list[Result]] = {name: [] for name, _ in plan.runs}
    for number, ((name, seed), run) in enumerate(plan.runs.items(), start=1):
        error = _done(run, f"{name}, seed {seed} ({number} of {len(plan.runs)})", timeout_s, console)
        results[name].append(Result(seed, None if error else _curve(run), error))
    return results


def _done(run: Run, title: str, timeout_s: float, console: Console) -> str | None:
    """Do a run unless it is complete; returns what it failed with."""
    if run.is_complete():
        console.print(
            f"{title}: was done before, final reward {final_reward(_curve(run)):.3f}", highlight=False
        )
        return None
    began = time.monotonic()
    with console.status(title):
        error = run.do(timeout_s=timeout_s)
    outcome = f"failed: {error}" if error else f"final reward {final_reward(_curve(run)):.3f}"
    seconds = time.monotonic() - began
    console.print(f"{title}: {outcome} ({seconds:.0f} s)", highlight=False, markup=False)
    return error


def _curve(run: Run) -> Curve:
    rollout = run.config.rollout
    return Curve(
        rewards=tuple(step["reward_mean"] for step in run.metrics),
        samples_per_step=rollout.prompts_per_step * rollout.samples_per_prompt,
    )


def _ranked(summaries: Mapping[str, Summary]) -> list[str]:
    def mean(name: str) -> float:
        spread = summaries[name].mean_reward
        return spread.mean if spread else float("-inf")

    return sorted(summaries, key=mean, reverse=True)


def _row(name: str, summary: Summary) -> tuple[str, ...]:
    worst = summary.worst_final_reward
    return (
        name,
        "yes" if _has_value_model(name) else "no",
        _reached(summary),
        _text(summary.mean_reward, "{:.3f}"),
        _text(summary.final_reward, "{:.3f}"),
        "-" if worst is None else f"{worst:.3f}",
        str(summary.num_failed),
        str(summary.num_degenerate),
    )


def _has_value_model(name: str) -> bool:
    return make_algorithm(settings_class(name).model_validate({"name": name})).needs.value_model


def _reached(summary: Summary) -> str:
    num_whole = summary.num_runs - summary.num_failed
    if summary.samples_to_reach is None:
        return "not reached" if num_whole else "-"
    some = f" ({summary.num_reached} of {num_whole} seeds)" if summary.num_reached < num_whole else ""
    return _text(summary.samples_to_reach, "{:.0f}") + some


def _text(spread: Spread | None, number: str) -> str:
    if spread is None:
        return "-"
    mean = number.format(spread.mean)
    return mean if spread.std is None else f"{mean} ± {number.format(spread.std)}"


def _rich_table(rows: list[tuple[str, ...]]) -> Table:
    table = Table()
    for place, title in enumerate(rows[0]):
        table.add_column(title, justify="left" if place < 2 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _write(
    folder: Path,
    plan: Plan,
    results: Mapping[str, list[Result]],
    summaries: Mapping[str, Summary],
    reward: float,
) -> None:
    from rlhf_dist.bench.plots import plot_curves

    first_runs = {name: run for (name, seed), run in plan.runs.items() if seed == results[name][0].seed}
    write_json(
        folder / "results.json",
        {
            "version": __version__,
            "reward": reward,
            "algorithms": {
                name: {
                    "settings": first_runs[name].config.model_dump(mode="json"),
                    "summary": asdict(summaries[name]),
                    "runs": [asdict(result) for result in results[name]],
                }
                for name in _ranked(summaries)
            },
        },
    )
    write_atomically(folder / "table.md", markdown(table_rows(summaries, reward)))
    curves = {name: [one.curve for one in results[name] if one.curve] for name in _ranked(summaries)}
    plot_curves(curves, folder / "curves.png", reward=reward)
