"""A run of a bench: when it is complete, and that no run of other settings is reused or lost."""

from __future__ import annotations

import json
import sys

import psutil
import pytest

from rlhf_dist.bench.runs import Run
from rlhf_dist.config import load_config, to_yaml
from rlhf_dist.errors import ConfigError


@pytest.fixture
def run(file):
    """A run of three steps, nothing of it done."""
    return Run(load_config(file, [f"run.dir={file.parent / 'bench' / 'seed-4'}"]))


def leave(run, *, num_steps, ended, config=None):
    """What a run leaves after so many steps."""
    run.folder.root.mkdir(parents=True)
    run.folder.config.write_text(config or to_yaml(run.config))
    run.folder.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(num_steps)))
    run.folder.answers.write_text(json.dumps({"before": []} | ({"after": []} if ended else {})))


@pytest.mark.parametrize(
    ("num_steps", "ended", "complete"),
    [(3, True, True), (3, False, False), (2, False, False), (2, True, False)],
)
def test_a_run_is_complete_with_its_last_step_and_its_last_file(run, num_steps, ended, complete):
    assert not run.is_complete()
    leave(run, num_steps=num_steps, ended=ended)
    assert run.is_complete() is complete


def test_the_same_run_may_be_reused(run):
    run.check()
    leave(run, num_steps=3, ended=True)
    run.check()


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_of_other_settings_is_refused_with_their_names(run, file, ended):
    other = load_config(file, [f"run.dir={run.config.run.dir}", "run.num_steps=9", "algorithm.clip_low=0.3"])
    leave(run, num_steps=3, ended=ended, config=to_yaml(other))
    with pytest.raises(ConfigError) as caught:
        run.check()
    assert str(caught.value) == (
        f"{run.folder.root} holds a run with other settings (run.num_steps, algorithm.clip_low); delete that "
        "folder to do the run again, or name another bench folder"
    )


def test_settings_of_a_run_without_a_step_do_not_matter(run):
    leave(run, num_steps=0, ended=False, config="run: {}")
    run.check()


def test_a_key_that_came_later_counts_with_its_default(run):
    lines = to_yaml(run.config).splitlines(keepends=True)
    shorter = [line for line in lines if "lam:" not in line]
    assert len(shorter) == len(lines) - 1
    leave(run, num_steps=3, ended=True, config="".join(shorter))
    run.check()


def test_a_run_of_a_configuration_that_is_no_longer_valid_is_refused(run):
    leave(run, num_steps=3, ended=True, config=to_yaml(run.config) + "gone: 1\n")
    with pytest.raises(ConfigError, match="other settings \\(a key that is no longer known\\)"):
        run.check()


# --------------------------------------------------------------------------------------- its process


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script in the place of Python; its arguments are then in the file `arguments`."""

    def put(script):
        path = tmp_path / "program"
        path.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo step 1; exit 0", None),
        ("echo 'error: first'; echo 'error: no GPU, take another'; echo bye; exit 6", "no GPU, take another"),
        ("echo Traceback; echo 'KeyError: 3'; echo; exit 1", "KeyError: 3"),
        ("exit 7", "exit code 7, without a word"),
        ("echo step 1; kill -KILL $$", "killed by SIGKILL"),
    ],
)
def test_a_run_that_fails_says_with_what(run, program, script, error):
    program(script)
    assert run.do(timeout_s=60) == error


@pytest.mark.parametrize(("num_steps", "option"), [(0, "--overwrite"), (2, "--resume")])
def test_what_an_interrupted_run_has_done_is_not_done_again(run, program, tmp_path, num_steps, option):
    program("exit 0")
    leave(run, num_steps=num_steps, ended=False)
    run.do(timeout_s=60)
    settings = run.config.run.dir.with_suffix(".yaml")
    assert (tmp_path / "arguments").read_text().split() == ["-m", "rlhf_dist", "train", str(settings), option]
    assert load_config(settings) == run.config


def test_a_run_that_takes_too_long_is_ended(run, program):
    program("while :; do sleep 0.05; done")
    others = psutil.Process().children()
    assert run.do(timeout_s=0.5) == "did not end within 0.5 s"
    assert [each for each in psutil.Process().children() if each not in others] == []
