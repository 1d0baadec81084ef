"""The command line. Errors a person can mend are one message and an exit code; others keep their trace."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from rlhf_dist import __version__
from rlhf_dist.cluster.imports import without_garbage_collection
from rlhf_dist.errors import ConfigError, RunError, TerminatedError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning from human feedback on Ray, vLLM and DeepSpeed.",
)

INTERRUPTED = 130
TERMINATED = 143
TERMINATION_DEADLINE_S = 8
"""After SIGTERM. Where the whole process group got it, Ray's own processes are gone, and ending hangs."""
RESUME_HINT = "--resume goes on from the last checkpoint, if there is one"
REPLAY_HINT = "the run's folder is as it was"
BENCH_HINT = "the same command goes on where it stopped"
BEGIN_AGAIN = "the same command begins again"

bench = typer.Typer(no_args_is_help=True, help="Measure the real system.")
app.add_typer(bench, name="bench")


@app.callback()
def _root() -> None:
    """Keeps `train` a subcommand."""


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Any key of the configuration, as in rollout.num_workers=2.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join. Default: RAY_ADDRESS, else a local instance.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the inputs, as far as nothing has to be read or made for it, and print the "
            "configuration and the placement; start nothing.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in the run folder first.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Stack traces, and the workers' own output.")
    ] = False,
) -> None:
    """Train a policy."""
    console = Console(soft_wrap=True)
    with _errors_for_people(verbose):
        with without_garbage_collection():
            from rlhf_dist.config import load_config

        if resume and overwrite:
            raise RunError("--resume goes on with a run and --overwrite deletes it; choose one")
        settings = load_config(config, overrides or [])
        if dry_run:
            with without_garbage_collection():
                from rlhf_dist.driver.dry_run import print_plan

            print_plan(settings, console)
            return
        with without_garbage_collection():
            from rlhf_dist.driver.run import run
            from rlhf_dist.driver.run_folder import IfExists

        if_exists: IfExists = "resume" if resume else "overwrite" if overwrite else "refuse"
        run(settings, address=address, if_exists=if_exists, console=console, verbose=verbose)


@app.command()
def inspect(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run (run.dir), also of one going on.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same numbers as a JSON object.")] = False,
) -> None:
    """Check a run's journal: every prompt trained once, no token too old. Exit code 1 if not."""
    with _errors_for_people(verbose=False):
        from rlhf_dist.driver.run_folder import RunFolder
        from rlhf_dist.driver.starting_point import reported_steps
        from rlhf_dist.experience.inspection import inspect_run, print_inspection

        folder = RunFolder(run_folder)
        folder.check_journal()
        found = inspect_run(run_folder, reported=reported_steps(folder))
        if as_json:
            print(json.dumps(found.as_json(), indent=2))
        else:
            print_inspection(Console(soft_wrap=True), found)
    if found.violations:
        raise typer.Exit(1)


@app.command()
def replay(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run (run.dir), also of one going on.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Another setting for the same experience, as in algorithm.clip_low=0.1."),
    ] = None,
    from_step: Annotated[int, typer.Option(min=0, help="First learner step, counted from 0.")] = 0,
    to_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The step to stop before: it is not replayed itself, and the policy at the end is the one "
            "that it starts from. Default: all trained steps.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the policy after the last step, as a Hugging Face checkpoint."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join. Default: RAY_ADDRESS, else a local instance.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as a JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Stack traces, and the workers' own output.")
    ] = False,
) -> None:
    """Do learner steps of a run again, from its checkpoints and journal. Exit code 1 if a policy differs.

    Steps FROM_STEP to TO_STEP - 1, from the newest checkpoint before. The run's folder is only read.
    """
    console = Console(soft_wrap=True)
    with _errors_for_people(verbose, REPLAY_HINT):
        from rlhf_dist.driver.replay import print_replay
        from rlhf_dist.driver.replay import replay as replay_run

        found = replay_run(
            run_folder,
            overrides or [],
            from_step=from_step,
            to_step=to_step,
            out=out,
            address=address,
            console=Console(soft_wrap=True, stderr=True) if as_json else console,
            verbose=verbose,
        )
        if as_json:
            print(json.dumps(found.as_json(), indent=2))
        else:
            print_replay(console, found)
    if not found.as_expected:
        raise typer.Exit(1)


@bench.command("algorithms")
def bench_algorithms(
    config: Annotated[
        Path, typer.Argument(help="YAML file of the run; its section `algorithm` does not count.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the configuration, for every run: run.num_steps=25.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the comparison; runs that are complete in it are not done again.")
    ] = Path("runs/bench-algorithms"),
    algorithms: Annotated[str | None, typer.Option(help="Names, as in ppo,grpo. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each algorithm, from run.seed on.")] = 3,
    tuning: Annotated[
        Path | None, typer.Option(help="YAML file of overrides: `common`, and `per_algorithm`.")
    ] = None,
    reward: Annotated[float, typer.Option(help="The reward that samples are counted to.")] = 0.8,
    run_timeout_s: Annotated[float, typer.Option(help="The longest that one run may take.")] = 86_400,
    verbose: Annotated[bool, typer.Option("--verbose", help="Stack traces.")] = False,
) -> None:
    """Compare the algorithms' reward against samples used, over seeds."""
    console = Console(soft_wrap=True)
    with _errors_for_people(verbose, BENCH_HINT):
        from rlhf_dist.algorithms import algorithm_names
        from rlhf_dist.bench.algorithms import Tuning, compare_algorithms, make_plan, read_tuning

        plan = make_plan(
            config,
            overrides or [],
            tuning=read_tuning(tuning) if tuning else Tuning(),
            algorithms=algorithms.replace(",", " ").split() if algorithms else algorithm_names(),
            num_seeds=seeds,
            folder=out.absolute(),
        )
        compare_algorithms(plan, out.absolute(), reward=reward, timeout_s=run_timeout_s, console=console)


@bench.command("logprobs")
def bench_logprobs(
    tokens: Annotated[int, typer.Option(min=1, help="Response tokens of the batch.")] = 4096,
    vocabulary: Annotated[int, typer.Option(min=2, help="Words of the vocabulary.")] = 150_000,
) -> None:
    """Measure the peak memory of log-probabilities over a large vocabulary."""
    with _errors_for_people(verbose=False, how_to_go_on=BEGIN_AGAIN):
        from rlhf_dist.bench.logprobs import print_peaks

        print_peaks(Console(soft_wrap=True), num_tokens=tokens, vocab_size=vocabulary)


@bench.command("weights")
def bench_weights(
    sizes_mb: Annotated[str, typer.Option(help="Sizes of the model, in MB.")] = "10,100,1000",
    workers: Annotated[str, typer.Option(help="Numbers of rollout workers.")] = "1,2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Measured publications of each case.")] = 7,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="Of the learner and of each rollout worker. 0: on CPU.")
    ] = 0,
    transport: Annotated[
        Literal["auto", "shared_memory", "ipc", "nccl"], typer.Option(help="As weights.transport.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Stack traces, and the workers' output.")
    ] = False,
) -> None:
    """Measure how long new weights take from the learner to every engine."""
    with _errors_for_people(verbose, BEGIN_AGAIN):
        from rlhf_dist.bench.weights import measure_weights

        counts = _whole_numbers("--workers", workers)
        cases = [(size, count) for size in _whole_numbers("--sizes-mb", sizes_mb) for count in counts]
        measure_weights(
            cases,
            rounds=rounds,
            gpus_per_worker=gpus_per_worker,
            transport=transport,
            out=out,
            console=Console(soft_wrap=True),
            verbose=verbose,
        )


@bench.command("inputs")
def bench_inputs(
    folder: Annotated[Path, typer.Argument(help="New folder, for `policy` and `prompts.jsonl`.")],
    prompts: Annotated[int, typer.Option(min=1, help="Rows of the prompt file.")] = 512,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, chat template included.")] = 24,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the policy.")] = 192,
    layers: Annotated[int, typer.Option(min=1, help="Of the policy.")] = 6,
    vocabulary: Annotated[int, typer.Option(min=1, help="Tokens of its tokenizer, at most.")] = 1024,
) -> None:
    """Make an untrained policy (3.0 M parameters by default) and prompts of one length, for `bench ppo`."""
    with _errors_for_people(verbose=False, how_to_go_on=BEGIN_AGAIN):
        from rlhf_dist.bench.inputs import make_inputs

        num_parameters = make_inputs(
            folder,
            num_prompts=prompts,
            prompt_tokens=prompt_tokens,
            hidden_size=hidden_size,
            num_layers=layers,
            vocab_size=vocabulary,
        )
        print(f"{folder / 'policy'} ({num_parameters:,} parameters)\n{folder / 'prompts.jsonl'}")


@bench.command("ppo")
def bench_ppo(
    policy: Annotated[str, typer.Argument(help="Checkpoint folder or hub name; see `bench inputs`.")],
    prompts: Annotated[str, typer.Argument(help="Prompt file, or what else `data.prompts` takes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the configuration: rollout.num_workers=2.")
    ] = None,
    prompts_per_step: Annotated[int, typer.Option("--prompts", min=1, help="Of an iteration.")] = 64,
    response_tokens: Annotated[int, typer.Option(min=1, help="Of the longest response.")] = 64,
    lengths: Annotated[
        Literal["uniform", "ragged"], typer.Option(help="All that long, or a third of it on average.")
    ] = "uniform",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over each batch.")] = 4,
    iterations: Annotated[int, typer.Option(min=1, help="Measured ones.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Iterations before them.")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file for figures and work.")] = None,
    timeout_s: Annotated[float, typer.Option(help="The longest that the run or a part may take.")] = 3600,
    verbose: Annotated[bool, typer.Option("--verbose", help="Stack traces.")] = False,
) -> None:
    """Compare the speed of whole iterations of PPO with that of their parts alone."""
    console = Console(soft_wrap=True)
    with _errors_for_people(verbose, BEGIN_AGAIN):
        from rlhf_dist.bench.ppo import make_work, measure_ppo

        with tempfile.TemporaryDirectory() as folder:
            work = make_work(
                policy,
                prompts,
                overrides or [],
                folder=Path(folder),
                lengths=lengths,
                response_tokens=response_tokens,
                prompts_per_step=prompts_per_step,
                num_epochs=epochs,
                num_iterations=iterations,
                num_warmup=warmup,
            )
            measure_ppo(work, Path(folder), out=out, timeout_s=timeout_s, console=console)


@bench.command("queue")
def bench_queue(
    producers: Annotated[str, typer.Option(help="Numbers of producers.")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(min=0, help="Of each number's measurement.")] = 10,
    samples_per_batch: Annotated[
        int, typer.Option(min=1, help="Samples that a producer sends at once.")
    ] = 32,
    response_tokens: Annotated[int, typer.Option(min=1, help="Of the longest response.")] = 64,
    soak_minutes: Annotated[float, typer.Option(min=0, help="Then go on so long, and watch memory.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Stack traces, and the workers' own output.")
    ] = False,
) -> None:
    """Measure the experience's way from scoring workers through the queue to the learner."""
    with _errors_for_people(verbose, BEGIN_AGAIN):
        from rlhf_dist.bench.queue import Sizes, measure_queue

        measure_queue(
            _whole_numbers("--producers", producers),
            Sizes(samples_per_batch, response_tokens),
            seconds=seconds,
            soak_s=60 * soak_minutes,
            out=out,
            console=Console(soft_wrap=True),
            verbose=verbose,
        )


@bench.command("pipeline")
def bench_pipeline(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the configuration, for both runs.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run; the first two do not count.")] = 12,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    timeout_s: Annotated[float, typer.Option(help="The longest that one run may take.")] = 3600,
    verbose: Annotated[bool, typer.Option("--verbose", help="Stack traces.")] = False,
) -> None:
    """Compare a run whose generation and learning take turns with one in which they overlap."""
    console = Console(soft_wrap=True)
    with _errors_for_people(verbose, BEGIN_AGAIN):
        from rlhf_dist.bench.pipeline import measure_pipeline

        measure_pipeline(
            config, overrides or [], num_steps=steps, out=out, timeout_s=timeout_s, console=console
        )


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option}={text} is not a list of whole numbers from 1 on, as in 1,2,4")
    return numbers


class _errors_for_people:  # noqa: N801  a context manager, used like a function
    """Turns what ends a run into a message and an exit code."""

    def __init__(self, verbose: bool, how_to_go_on: str = RESUME_HINT) -> None:
        self._verbose = verbose
        self._how_to_go_on = how_to_go_on
        self._terminated = False

    def __enter__(self) -> None:
        sys.path.insert(0, str(Path.cwd()))  # reward functions of the folder the run is started from
        signal.signal(signal.SIGTERM, self._terminate)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._end(f"interrupted; {self._how_to_go_on}", INTERRUPTED)
        if isinstance(error, TerminatedError):
            self._end(str(error), error.exit_code)
        if self._terminated:
            sys.exit(TERMINATED)  # Ray turns the code of an exit that is raised inside its waits into 1
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            self._end(
                f"terminated; {self._how_to_go_on}", TERMINATED
            )  # it came while ray.init had a handler of its own in place
        if isinstance(error, RunError) and not self._verbose:
            self._end(f"error: {error}", error.exit_code)

    def _terminate(self, *_: object) -> NoReturn:
        self._terminated = True
        watchdog = threading.Timer(TERMINATION_DEADLINE_S, os._exit, args=(TERMINATED,))
        watchdog.daemon = True
        watchdog.start()
        self._end(f"terminated; {self._how_to_go_on}", TERMINATED)

    @staticmethod
    def _end(message: str, code: int) -> NoReturn:
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)


def main() -> None:
    """Entry point of `rlhf-dist`."""
    app()
