"""The command line: what a dry run shows and leaves alone, and with which code each failure ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

import rlhf_dist
from rlhf_dist.cli import app
from rlhf_dist.config import Config, parse_config
from rlhf_dist.driver.replay import Replay, ReplayedStep

SETTINGS = {
    "run": {"dir": "runs/dry", "num_steps": 3},
    "policy": {"model": "task:support-desk"},
    "reward": [{"kind": "function", "path": "rlhf_dist.tasks.support_desk:reward"}],
    "data": {"prompts": "task:support-desk"},
    "sft": {"demonstrations": "task:support-desk"},
    "rollout": {"num_workers": 3},
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A configuration in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch):
    """A command changes the import path and the handler of SIGTERM of its process, which here is ours."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def no_process_may_start(monkeypatch):
    """Whatever would start one fails the test."""

    def refuse(*args, **_):
        raise AssertionError(f"a process was to be started: {args}")

    for name in ("subprocess.Popen.__init__", "os.fork", "os.posix_spawn", "ray.init"):
        monkeypatch.setattr(name, refuse)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_prints_every_section_and_the_workers_and_starts_nothing(file):
    result = invoke("train", file, "learner.zero_stage=3", "--dry-run")
    assert result.exit_code == 0, result.output
    printed, table = result.stdout.split("Workers, for nodes of ")
    tree = yaml.safe_load(printed)
    assert list(tree) == list(Config.model_fields)
    expected = parse_config(SETTINGS | {"learner": {"zero_stage": 3}}, source="test")
    assert parse_config(tree, source="printed") == expected
    assert [line.split(":  ")[0].split(": ")[0].strip() for line in table.splitlines()[1:]] == [
        "3 x ray::RolloutWorker  vLLM",
        "1 x ray::ScoringWorker  transformers",
        "2 x ray::LearnerWorker  DeepSpeed ZeRO-3",
        "1 x ray::ExperienceQueue  references only",
    ]


def test_a_dry_run_makes_no_file(file):
    assert invoke("train", file, "--dry-run").exit_code == 0
    assert [path.name for path in file.parent.iterdir()] == ["run.yaml"]


def test_a_dry_run_checks_the_inputs(file):
    result = invoke("train", file, "reward.0.path=no_such_rewards:score", "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error: reward function 'no_such_rewards:score': module 'no_such_rewards'"
    )
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prompts=./none.jsonl", "./none.jsonl: no such file or folder"),
        ("data.prompts=./run.yaml", "./run.yaml: not a kind of file that is read"),
        ("data.prompts=task:suport-desk", "task:suport-desk: no task of this name has prompts"),
        ("sft.demonstrations=./none.jsonl", "./none.jsonl: no such file or folder"),
    ],
)
@pytest.mark.parametrize("option", [("--dry-run",), ()])
def test_data_that_is_not_there_is_found_before_anything_starts(option, override, message, file):
    result = invoke("train", file, override, *option)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: {message}")
    assert "run:" not in result.stdout


def test_a_dry_run_looks_for_no_data_set_on_the_hub(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert invoke("train", file, "data.prompts=somebody/prompts", "--dry-run").exit_code == 0


def test_reward_functions_may_lie_in_the_working_folder(file):
    (file.parent / "rewards_of_this_folder.py").write_text("def score(*_):\n    return []\n")
    result = invoke("train", file, "reward.0.path=rewards_of_this_folder:score", "--dry-run")
    assert result.exit_code == 0, result.output


# ----------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("rollout.num_worker=1",), 2, "unknown key rollout.num_worker; did you mean rollout.num_workers?"),
        (("run.num_steps=0",), 2, "run.num_steps=0: input should be greater than or equal to 1"),
        (("run.seed",), 2, "'run.seed' is not an override"),
        (("policy.model=./no-such-folder",), 4, "policy model: folder './no-such-folder' does not exist"),
        (
            ("--resume", "--overwrite"),
            1,
            "--resume goes on with a run and --overwrite deletes it",
        ),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_a_code(arguments, code, message, file):
    result = invoke("train", file, *arguments, "--dry-run")
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_missing_file_ends_with_the_code_of_the_configuration(file):
    result = invoke("train", file.with_name("rum.yaml"), "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: configuration file {file.with_name('rum.yaml')} does not exist")


def test_a_run_folder_in_the_way_is_found_before_anything_starts(file):
    (file.parent / "runs" / "dry" / "checkpoints").mkdir(parents=True)
    (file.parent / "runs" / "dry" / ".rlhf-dist-run").touch()
    result = invoke("train", file)
    assert result.exit_code == 2
    assert "already holds a run; pass --resume" in result.stderr


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_trust_region_under_zero_is_refused_before_anything_starts(zero_stage, file):
    """By the command itself, in whose process nothing may start another one."""
    arguments = ("train", file, "algorithm={name: trpo}")
    result = invoke(*arguments, f"learner.zero_stage={zero_stage}")
    assert result.exit_code == 2
    assert f"learner.zero_stage={zero_stage}; set learner.zero_stage=0" in result.stderr
    assert invoke(*arguments, "learner.zero_stage=0", "--dry-run").exit_code == 0


def test_with_verbose_the_error_keeps_its_trace(file):
    result = invoke("train", file, "run.num_steps=0", "--dry-run", "--verbose")
    assert type(result.exception).__name__ == "ConfigError"
    assert result.exception.__traceback__ is not None


def test_a_fault_of_the_program_is_not_swallowed(file, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rlhf_dist.driver.dry_run.print_plan", broken)
    assert isinstance(invoke("train", file, "--dry-run").exception, ZeroDivisionError)


def test_an_interrupt_says_how_to_go_on(file, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_dist.driver.dry_run.print_plan", interrupted)
    result = invoke("train", file, "--dry-run")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; --resume goes on from the last checkpoint, if there is one\n"


KILL_DURING_A_DRY_RUN = """
import signal
from rlhf_dist import cli
from rlhf_dist.driver import dry_run
dry_run.print_plan = lambda *_: signal.raise_signal(signal.SIGTERM)
cli.main()
"""


def test_a_polite_kill_ends_the_command_in_order(file, monkeypatch):
    monkeypatch.undo()  # this process may start one
    command = [sys.executable, "-c", KILL_DURING_A_DRY_RUN, "train", str(file), "--dry-run"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert killed.returncode == 143
    assert killed.stderr == "terminated; --resume goes on from the last checkpoint, if there is one\n"


# ------------------------------------------------------------------------------- inspect and replay


@pytest.mark.parametrize("command", ["inspect", "replay"])
def test_a_folder_without_a_journal_is_no_run(command, file):
    (file.parent / "config.yaml").touch()
    result = invoke(command, file.parent)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {file.parent} has no folder 'journal'; name the folder of a run (run.dir)\n"
    )
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.yaml", "run.yaml"]


@pytest.mark.parametrize("command", ["inspect", "replay"])
def test_a_run_that_is_still_starting_has_no_samples_yet(command, file):
    (file.parent / ".rlhf-dist-run").touch()
    result = invoke(command, file.parent)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: run {file.parent} has no samples yet: it is still starting, or ended before there were any\n"
    )


@pytest.mark.parametrize("command", ["inspect", "replay"])
def test_a_run_that_has_trained_and_has_no_journal_has_lost_it(command, file):
    (file.parent / ".rlhf-dist-run").touch()
    (file.parent / "metrics.jsonl").write_text('{"step": 0}\n')
    result = invoke(command, file.parent)
    assert result.exit_code == 1
    assert f"error: run {file.parent} has lost its folder 'journal'" in result.stderr


@pytest.mark.parametrize(("changed", "code"), [((), 1), (("algorithm.clip_low=0.1",), 0)])
def test_only_a_difference_that_nothing_explains_is_a_failure(changed, code, file, monkeypatch):
    step = ReplayedStep(3, 16, 0.5, None, recorded_digest="aa", replayed_digest="ab")
    monkeypatch.setattr(
        "rlhf_dist.driver.replay.replay", lambda *_, **__: Replay("step-000003", 3, (step,), changed)
    )
    result = invoke("replay", file.parent, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {
        "checkpoint": "step-000003",
        "first_step": 3,
        "steps": [
            {
                "step": 3,
                "num_samples": 16,
                "reward_mean": 0.5,
                "policy_loss": None,
                "recorded_digest": "aa",
                "replayed_digest": "ab",
                "same": False,
            }
        ],
        "changed": list(changed),
        "same": False,
        "as_expected": bool(changed),
    }


def test_an_interrupted_replay_says_that_nothing_was_changed(file, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_dist.driver.replay.replay", interrupted)
    result = invoke("replay", file.parent)
    assert (result.exit_code, result.stderr) == (130, "interrupted; the run's folder is as it was\n")


# ---------------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algorithms", "ppo,grpu"), "algorithm 'grpu' is not known; did you mean grpo?"),
        (("run.dir=elsewhere",), "--out says where the runs go"),
        (("--tuning", "no-such.yaml"), "tuning file no-such.yaml cannot be read"),
    ],
)
def test_a_comparison_that_cannot_be_made_ends_with_the_code_of_the_configuration(arguments, message, file):
    result = invoke("bench", "algorithms", file, "--out", file.parent / "out", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (file.parent / "out").exists()


def test_an_interrupted_comparison_says_how_to_go_on(file, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_dist.bench.algorithms.compare_algorithms", interrupted)
    result = invoke("bench", "algorithms", file, "rollout.samples_per_prompt=2", "--out", file.parent / "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; the same command goes on where it stopped\n"


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("queue", "--producers", "2,x"), "--producers=2,x is not a list of whole numbers from 1 on"),
        (("queue", "--producers", "0"), "--producers=0 is not a list of whole numbers from 1 on"),
        (
            ("pipeline", "run.yaml", "--steps", "2"),
            "--steps=2: the first 2 do not count; do at least one more",
        ),
        (("ppo", "no/such/policy", "prompts.jsonl"), "prompts.jsonl: no such file or folder"),
    ],
)
def test_a_bench_checks_its_sizes_before_it_starts(arguments, message):
    result = invoke("bench", *arguments)
    assert result.exit_code in (2, 3)
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "arguments", [("queue",), ("weights",), ("pipeline", "run.yaml"), ("ppo", "a/policy", "prompts.jsonl")]
)
def test_a_bench_whose_file_cannot_be_written_does_not_begin(arguments):
    result = invoke("bench", *arguments, "--out", "no/such/results.json")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --out no/such/results.json: there is no folder no/such; make it first, or name another file\n"
    )


# -------------------------------------------------------------------------------------------- version


def test_version_prints_the_version():
    result = invoke("version")
    assert (result.exit_code, result.stdout) == (0, f"{rlhf_dist.__version__}\n")


def test_the_package_can_be_run_as_a_module(monkeypatch):
    monkeypatch.undo()  # this one is to start a process
    command = [sys.executable, "-m", "rlhf_dist", "version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rlhf_dist.__version__}\n", "")


def test_the_command_line_answers_before_heavy_modules_are_imported(monkeypatch):
    monkeypatch.undo()
    code = (
        "import sys, rlhf_dist.cli; print(sorted({'ray', 'torch', 'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------ bench


@pytest.mark.parametrize("sizes", ["ten", "0", "", "5,"])
def test_a_list_that_is_none_is_one_message(sizes):
    result = invoke("bench", "weights", "--sizes-mb", sizes)
    assert result.exit_code == 2
    assert f"error: --sizes-mb={sizes} is not a list of whole numbers from 1 on, as in 1,2,4" in result.stderr
