"""What `rlhf-dist bench algorithms` would run, and how it shows results. Nothing is run here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_dist.algorithms import algorithm_names
from rlhf_dist.bench.algorithms import (
    Tuning,
    compare_algorithms,
    make_plan,
    markdown,
    read_tuning,
    table_rows,
)
from rlhf_dist.bench.curves import Curve, summarize
from rlhf_dist.bench.plots import plot_curves
from rlhf_dist.errors import ConfigError, RunError


@pytest.fixture
def plan(file):
    """Makes a plan in the folder `bench`."""

    def make(*overrides, tuning=None, algorithms=("ppo", "grpo"), num_seeds=2):
        return make_plan(
            file,
            overrides,
            tuning=tuning or Tuning(),
            algorithms=algorithms,
            num_seeds=num_seeds,
            folder=file.parent / "bench",
        )

    return make


@pytest.fixture
def in_folder(file):
    """Does a plan in the folder `bench`."""

    def compare(plan):
        compare_algorithms(plan, file.parent / "bench", reward=0.8, timeout_s=1, console=Console())

    return compare


def test_every_algorithm_runs_once_a_seed_in_a_folder_of_its_own(plan, file):
    runs = plan(algorithms=algorithm_names(), num_seeds=3).runs
    assert set(runs) == {(name, seed) for name in algorithm_names() for seed in (4, 5, 6)}
    for (name, seed), run in runs.items():
        assert run.config.algorithm.name == name
        assert run.config.run.seed == seed
        assert run.config.run.dir == file.parent / "bench" / "runs" / name / f"seed-{seed}"


def test_algorithms_of_a_seed_differ_in_their_own_section_only(plan):
    runs = plan(algorithms=algorithm_names(), num_seeds=1).runs
    shared = set()
    for run in runs.values():
        tree = run.config.model_dump(mode="json")
        del tree["algorithm"], tree["run"]["dir"]
        shared.add(str(tree))
    assert len(shared) == 1


def test_each_algorithm_has_its_own_defaults_and_not_those_of_the_file(plan):
    runs = plan().runs
    assert runs["ppo", 4].config.algorithm.num_epochs == 4
    assert runs["ppo", 4].config.algorithm.clip_low == 0.2
    assert runs["grpo", 4].config.algorithm.num_epochs == 1


def test_all_algorithms_of_a_seed_start_from_its_supervised_policy(plan, file):
    starts, runs = (made := plan()).starts, made.runs
    assert sorted(starts) == [4, 5]
    for seed, start in starts.items():
        assert start.config.run.num_steps == 1
        assert start.config.sft is not None
        assert start.config.run.seed == seed
    for (_, seed), run in runs.items():
        assert run.config.policy.model == str(file.parent / "bench" / "start" / f"seed-{seed}" / "sft-policy")
        assert run.config.sft is None


def test_without_a_supervised_stage_nothing_comes_before(plan):
    made = plan("sft=null")
    assert made.starts == {}
    assert {run.config.policy.model for run in made.runs.values()} == {"task:support-desk"}


def test_the_command_line_comes_after_the_tuning_and_one_algorithm_after_all(plan):
    tuning = Tuning(
        common=("run.num_steps=5", "learner.policy_optimizer.learning_rate=1e-3", "rollout.num_workers=3"),
        per_algorithm={"grpo": ("learner.policy_optimizer.learning_rate=2e-3", "algorithm.num_epochs=2")},
    )
    runs = plan("rollout.num_workers=1", tuning=tuning).runs
    ppo, grpo = runs["ppo", 4].config, runs["grpo", 4].config
    assert (ppo.run.num_steps, grpo.run.num_steps) == (5, 5)
    assert (ppo.rollout.num_workers, grpo.rollout.num_workers) == (1, 1)
    assert ppo.learner.policy_optimizer.learning_rate == 1e-3
    assert grpo.learner.policy_optimizer.learning_rate == 2e-3
    assert (ppo.algorithm.num_epochs, grpo.algorithm.num_epochs) == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "tuning", "message"),
    [
        (("algorithm.name=grpo",), {}, "--algorithms says what is compared; leave it out"),
        ((), {"common": ("algorithm={name: ppo}",)}, "--algorithms says what is compared; leave it out"),
        (("run.dir=x",), {}, "--out says where the runs go; leave it out"),
        ((), {"per_algorithm": {"ppo": ("algorithm.name=grpo",)}}, "--algorithms says what is compared"),
        (
            (),
            {"per_algorithm": {"ppo": ("rollout.prompts_per_step=16",)}},
            "override 'rollout.prompts_per_step=16' of ppo: algorithms may differ in their sections "
            "algorithm and learner only",
        ),
        ((), {"per_algorithm": {"grp": ()}}, "algorithm 'grp' is not known; did you mean grpo?"),
        (("run.num_stepz=3",), {}, "unknown key run.num_stepz; did you mean run.num_steps?"),
        (("rollout.samples_per_prompt=1",), {}, "algorithm.name=grpo compares responses to the same prompt"),
    ],
)
def test_settings_that_make_no_comparison_are_refused(plan, overrides, tuning, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(*overrides, tuning=Tuning(**tuning))


@pytest.mark.parametrize(
    ("name", "hint"), [("pppo", "did you mean ppo?"), ("sarsa", f"there are: {', '.join(algorithm_names())}")]
)
def test_an_unknown_algorithm_is_named_with_the_nearest(plan, name, hint):
    with pytest.raises(ConfigError, match=re.escape(f"algorithm {name!r} is not known; {hint}")):
        plan(algorithms=("ppo", name))


def test_a_tuning_file_is_read(tmp_path):
    path = tmp_path / "tuning.yaml"
    path.write_text("common: [run.num_steps=5]\nper_algorithm:\n  ppo: [algorithm.num_epochs=2]\n")
    assert read_tuning(path) == Tuning(
        common=("run.num_steps=5",), per_algorithm={"ppo": ("algorithm.num_epochs=2",)}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: .*No such file"),
        ("common: [", "cannot be read"),
        ("[]", "because of the file"),
        ("comon: []", "because of comon: it has a list of overrides"),
        ("common: {run.num_steps: 5}", "because of common"),
        ("per_algorithm: {ppo: algorithm.num_epochs=2}", "because of per_algorithm.ppo"),
    ],
)
def test_a_broken_tuning_file_is_named_with_what_it_should_hold(tmp_path, text, message):
    path = tmp_path / "tuning.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"tuning file {path} .*{message}"):
        read_tuning(path)


def test_the_tuning_of_the_repository_gives_all_algorithms_the_same_samples(file):
    repository = Path(__file__).parents[3]
    runs = make_plan(
        repository / "configs" / "quickstart.yaml",
        (),
        tuning=read_tuning(repository / "benchmarks" / "algorithms.yaml"),
        algorithms=algorithm_names(),
        num_seeds=1,
        folder=file.parent / "bench",
    ).runs
    assert len({run.config.rollout for run in runs.values()}) == 1
    assert {
        run.config.rollout.prompts_per_step * run.config.rollout.samples_per_prompt for run in runs.values()
    } == {64}
    assert {run.config.algorithm.kl.coef for run in runs.values()} == {0.03}


# --------------------------------------------------------------------------------- before anything runs


def test_a_folder_that_holds_something_else_is_refused(plan, in_folder, file):
    (file.parent / "bench").mkdir()
    (file.parent / "bench" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"was not made for a bench \(it has thesis.tex\); set --out"):
        in_folder(plan())
    assert {path.name for path in (file.parent / "bench").iterdir()} == {"thesis.tex", ".lock"}


def test_without_the_plot_library_it_says_what_to_install_and_makes_nothing(
    plan, in_folder, file, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match="matplotlib, which is not installed: pip install matplotlib"):
        in_folder(plan())
    assert not (file.parent / "bench").exists()


def test_inputs_are_checked_before_the_first_run(plan, in_folder, file):
    with pytest.raises(ConfigError, match="no_such_rewards"):
        in_folder(plan("reward.0.path=no_such_rewards:score"))
    assert not (file.parent / "bench" / "start").exists()


# -------------------------------------------------------------------------------------------- results

SUMMARIES = {
    "ppo": summarize([Curve((0.4, 0.9, 0.9, 1.0), 64), Curve((0.4, 0.4, 0.4, 0.4), 64)], reward=0.7),
    "grpo": summarize([Curve((0.5, 1.0, 1.0, 1.0), 64), None], reward=0.7),
    "gspo": summarize([None, None], reward=0.7),
    "rloo": summarize([Curve((0.2, 0.3, 0.2, 0.3), 64), Curve((0.2, 0.3, 0.2, 0.3), 64)], reward=0.7),
}


def test_the_table_has_the_highest_mean_reward_on_top_and_failures_below():
    header, *rows = table_rows(SUMMARIES, 0.7)
    assert header[:3] == ("algorithm", "value model", "samples to reward 0.7")
    assert rows == [
        ("grpo", "no", "128", "0.875", "0.875", "0.875", "1", "0"),
        ("ppo", "yes", "128 (1 of 2 seeds)", "0.600 ± 0.283", "0.600 ± 0.283", "0.400", "0", "1"),
        ("rloo", "no", "not reached", "0.250 ± 0.000", "0.250 ± 0.000", "0.250", "0", "0"),
        ("gspo", "no", "-", "-", "-", "-", "2", "0"),
    ]


def test_the_table_for_documents_has_the_same_cells():
    lines = markdown(table_rows(SUMMARIES, 0.7)).splitlines()
    assert len(lines) == 6
    assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- | --- |"
    assert lines[2] == "| `grpo` | no | 128 | 0.875 | 0.875 | 0.875 | 1 | 0 |"


@pytest.mark.parametrize("num_algorithms", [1, 4])
def test_the_picture_has_a_panel_an_algorithm_failed_ones_too(tmp_path, num_algorithms):
    path = tmp_path / "curves.png"
    curves = {f"a{number}": [Curve((0.1, 0.2), 64)] * number for number in range(num_algorithms)}
    plot_curves(curves, path, reward=0.8)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
