"""The command line. Errors a person can mend are one message and an exit code; others keep their trace."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from rlhf_dist import __version__
from rlhf_dist.errors import RunError

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
TERMINATED_TEXT = f"terminated; {RESUME_HINT}"


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
        bool, typer.Option("--dry-run", help="Print the configuration and the placement; start nothing.")
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
        from rlhf_dist.config import load_config

        if resume and overwrite:
            raise RunError("--resume goes on with a run and --overwrite deletes it; choose one")
        settings = load_config(config, overrides or [])
        if dry_run:
            from rlhf_dist.driver.dry_run import print_plan

            print_plan(settings, console)
            return
        from rlhf_dist.driver.run import run
        from rlhf_dist.driver.run_folder import IfExists

        if_exists: IfExists = "resume" if resume else "overwrite" if overwrite else "refuse"
        run(settings, address=address, if_exists=if_exists, console=console, verbose=verbose)


class _errors_for_people:  # noqa: N801  a context manager, used like a function
    """Turns what ends a run into a message and an exit code."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._terminated = False

    def __enter__(self) -> None:
        sys.path.insert(0, str(Path.cwd()))  # reward functions of the folder the run is started from
        signal.signal(signal.SIGTERM, self._terminate)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._end(f"interrupted; {RESUME_HINT}", INTERRUPTED)
        if self._terminated:
            sys.exit(TERMINATED)  # Ray turns the code of an exit that is raised inside its waits into 1
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            self._end(TERMINATED_TEXT, TERMINATED)  # it came while ray.init had a handler of its own in place
        if isinstance(error, RunError) and not self._verbose:
            self._end(f"error: {error}", error.exit_code)

    def _terminate(self, *_: object) -> NoReturn:
        self._terminated = True
        watchdog = threading.Timer(TERMINATION_DEADLINE_S, os._exit, args=(TERMINATED,))
        watchdog.daemon = True
        watchdog.start()
        self._end(TERMINATED_TEXT, TERMINATED)

    @staticmethod
    def _end(message: str, code: int) -> NoReturn:
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)


def main() -> None:
    """Entry point of `rlhf-dist`."""
    app()
