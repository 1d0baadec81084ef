"""Chaos runs: their settings, the undisturbed run that they are compared with, and the table at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invariants import policies
from outcome import HEADINGS, Outcome, as_json, as_markdown
from shape import HEARTBEAT_TIMEOUT_S, NUM_STEPS, NUM_STEPS_OF_LONG_RUNS, PROMPTS_PER_STEP, START_TIMEOUT_S

from rlhf_dist.tasks.support_desk import make_policy

OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long suite: `make chaos ARGS="--chaos-runs 20 --chaos-seed 7"`."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos-runs", type=int, default=0, help="Long runs, each with a seed of its own.")
    group.addoption("--chaos-seed", type=int, default=0, help="Of the first long run; the next has one more.")
    group.addoption("--chaos-kills", type=int, default=10, help="Of each long run.")
    group.addoption("--chaos-out", type=Path, help="JSON file for the outcome of every kill.")
    group.addoption("--chaos-policy", type=Path, help="Checkpoint to start from. Default: an untrained one.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One long test for each seed."""
    if "chaos_seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--chaos-seed", 0)
        seeds = range(first, first + metafunc.config.getoption("--chaos-runs", 0))
        metafunc.parametrize("chaos_seed", seeds)


def pytest_configure(config: pytest.Config) -> None:
    """Room for outcomes."""
    config.stash[OUTCOMES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write every outcome where that was asked for."""
    found = config.stash[OUTCOMES]
    if not found:
        return
    terminalreporter.section("chaos: what the kills cost")
    for line in as_markdown(found):
        terminalreporter.write_line(line)
    path = config.getoption("--chaos-out", None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"headings": HEADINGS, "outcomes": as_json(found)}, indent=2) + "\n")
        terminalreporter.write_line(f"written to {path}")


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether the long suite was asked for."""
    return pytestconfig.getoption("--chaos-runs", 0) > 0


@pytest.fixture
def long_suite(is_long: bool) -> None:
    """For tests that take minutes."""
    if not is_long:
        pytest.skip("part of the long suite: make chaos")


@pytest.fixture(scope="session")
def num_steps(is_long: bool) -> int:
    """Of every run that is not stopped before."""
    return NUM_STEPS_OF_LONG_RUNS if is_long else NUM_STEPS


@pytest.fixture(scope="session")
def chaos_outcomes(pytestconfig: pytest.Config) -> list[Outcome]:
    """Where a test leaves what its kills did."""
    return pytestconfig.stash[OUTCOMES]


@pytest.fixture(scope="session")
def first_policy(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint that the runs start from."""
    given: Path | None = pytestconfig.getoption("--chaos-policy", None)
    if given is not None:
        return given
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def chaotic(first_policy: Path, num_steps: int) -> tuple[str, ...]:
    """Overrides of a run that is short and may be disturbed often: each role twice, hardly a limit, and a
    reward that even an untrained policy gets some of, or no step would change it."""
    return (
        f"policy.model={first_policy}",
        "sft=null",
        "reward.0.path=rlhf_dist.bench.iterations:vowels",
        f"run.num_steps={num_steps}",
        "run.deterministic=true",
        "run.num_sample_answers=1",
        f"rollout.prompts_per_step={PROMPTS_PER_STEP}",
        "rollout.samples_per_batch=4",
        "scoring.num_workers=2",
        "algorithm.num_epochs=2",
        "checkpoint.every_steps=4",
        "experience.max_attempts=100",
        "recovery.max_restarts=100",
        "recovery.backoff_s=0.1",
        "recovery.heartbeat_interval_s=1",
        f"recovery.heartbeat_timeout_s={HEARTBEAT_TIMEOUT_S}",
        f"cluster.start_timeout_s={START_TIMEOUT_S}",
    )


@pytest.fixture(scope="session")
def undisturbed(chaotic: tuple[str, ...], start, num_steps: int) -> Path:
    """Folder of the run that was left alone."""
    command = start(*chaotic)
    run = command.wait()
    assert run.returncode == 0, run.output
    assert not (run.folder / "events.jsonl").exists(), "nothing was lost"
    command.assert_nothing_left()
    assert len(set(policies(run.folder).values())) == num_steps, "every step made another policy"
    return run.folder
