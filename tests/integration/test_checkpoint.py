"""Checkpoints of the real learner: any number of ranks and any ZeRO stage go on from them; disks fill up."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from rlhf_dist.driver.checkpoint import find_damage, list_checkpoints
from rlhf_dist.errors import StorageError

KINDS = ("parameters", "exp_avg", "exp_avg_sq")
WRITTEN = {
    "a": {"stage": 2, "dtype": "float32"},
    "b": {"stage": 3, "dtype": "bfloat16"},
    "c": {"stage": 0, "dtype": "bfloat16"},
    "lora": {"stage": 1, "dtype": "float32", "lora": {"rank": 4}},
}
"""What two ranks write after two steps."""
READ_BY_ONE = [("a", 0), ("b", 0), ("c", 2), ("lora", 3)]
READ_BY_THREE = [("a", 3), ("b", 1), ("lora", 2)]
"""Which of it is read with which ZeRO stage."""
LARGEST_SHARE_OF_MOVE = {"float32": 1e-4, "bfloat16": 0.2}
"""How far, in the 2-norm, another cut may end from where the step went. With the 8 bits of bfloat16 a token's
ratio may fall on the other side of the clipping range."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that ranks of these tests write."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def by_two(folder):
    """Two ranks save after two steps and after a third; then new ones load, save at once, and do the third.

    The first ones of "a" also meet a full disk, twice, and go on. A last case has a policy that no step has
    trained.
    """

    def save(name):
        return {"save": str(folder / name)}

    cases = []
    for name, case in WRITTEN.items():
        limit = {"file_bytes": 50_000}
        full = [save("full") | limit, {"export": str(folder / "export")} | limit, 3] if name == "a" else []
        cases.append(case | {"do": [0, 1, save(name), 2, save(f"{name}-after"), *full]})
        load = {"load": str(folder / name)}
        cases.append(case | {"do": [load, save(f"{name}-again"), 2, save(f"{name}-after-again")]})
    warm_up = {"stage": 2, "dtype": "bfloat16", "algorithm": {"name": "ppo", "value_warmup_steps": 1}}
    cases.append(warm_up | {"do": [0, save("warm-up"), 1, save("warm-up-after")]})
    load = {"load": str(folder / "warm-up")}
    cases.append(warm_up | {"do": [load, 1, save("warm-up-after-again")]})
    return run_ranks("checkpoint_ranks.py", 2, folder, cases)


def read(num_ranks, stages, folder, *more):
    """Ranks load with other stages, save at once, and do the third step; returns the first one's results."""
    cases = []
    for name, stage in stages:
        load, target = {"load": str(folder / name)}, str(folder / f"{name}-{num_ranks}-{stage}")
        do = [load, {"save": target}, 2, {"save": f"{target}-after"}]
        cases.append(WRITTEN[name] | {"stage": stage, "do": do})
    return run_ranks("checkpoint_ranks.py", num_ranks, folder, [*cases, *more])[0]


@pytest.fixture(scope="module")
def by_one(folder, by_two):
    """A last case, whose result is returned, loads what it cannot."""
    assert by_two
    wrong = [{"load": str(folder / "lora")}, {"load": str(folder / "nothing")}]
    return read(1, READ_BY_ONE, folder, {"stage": 0, "dtype": "float32", "do": wrong})[-1]


@pytest.fixture(scope="module")
def by_three(folder, by_two):
    assert by_two
    return read(3, READ_BY_THREE, folder)


def flat(tensors):
    """All elements, by the tensors' names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def contents(folder):
    """Of all files, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_ranks_and_stage_go_on_bit_for_bit(name, folder, by_two):
    """Weights, moments, step counts and the algorithm's state, before and after a step."""
    assert by_two
    assert len(contents(folder / name)) == 9
    assert contents(folder / f"{name}-again") == contents(folder / name)
    assert contents(folder / f"{name}-after-again") == contents(folder / f"{name}-after")
    assert contents(folder / f"{name}-after") != contents(folder / name)


@pytest.mark.parametrize(("name", "stage"), READ_BY_ONE)
def test_one_rank_with_another_stage_loads_the_same_and_does_the_same_step(name, stage, folder, by_one):
    assert by_one
    assert_same_step(name, f"{name}-1-{stage}", folder)


@pytest.mark.long
@pytest.mark.parametrize(("name", "stage"), READ_BY_THREE)
def test_three_ranks_load_the_same_and_do_the_same_step(name, stage, folder, by_three):
    assert by_three
    assert_same_step(name, f"{name}-3-{stage}", folder)


def assert_same_step(name, cut, folder):
    assert contents(folder / cut) == contents(folder / name)
    for path in [f"{model}/{kind}.safetensors" for model in ("policy", "value") for kind in KINDS]:
        before, expected, found = (
            flat(load_file(folder / each / path)) for each in (name, f"{name}-after", f"{cut}-after")
        )
        moved = float((expected - before).norm())
        assert moved > 1e-3, "there is something to compare"
        assert float((found - expected).norm()) <= LARGEST_SHARE_OF_MOVE[WRITTEN[name]["dtype"]] * moved, path


@pytest.mark.parametrize("name", WRITTEN)
def test_a_checkpoint_has_whole_float32_tensors_of_what_is_trained(name, folder, by_two):
    assert by_two
    shapes = [
        {tensor: tuple(each.shape) for tensor, each in load_file(folder / name / path).items()}
        for path in (f"policy/{kind}.safetensors" for kind in KINDS)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(("lora_" in tensor) == ("lora" in WRITTEN[name]) for tensor in shapes[0])
    if "lora" not in WRITTEN[name]:
        assert shapes[0]["lm.model.norm.weight"] == (32,)
        assert "lm.lm_head.weight" not in shapes[0], "tied to the embedding"
    for path in (f"{model}/{kind}.safetensors" for model in ("policy", "value") for kind in KINDS):
        assert {each.dtype for each in load_file(folder / name / path).values()} == {torch.float32}


def test_a_policy_that_no_step_has_trained_has_no_moments(folder, by_two):
    assert by_two
    saved = contents(folder / "warm-up")
    assert {name for name in saved if name.startswith("policy/")} == {
        "policy/parameters.safetensors",
        "policy/progress.json",
    }
    assert "value/exp_avg.safetensors" in saved
    assert contents(folder / "warm-up-after-again") == contents(folder / "warm-up-after")


def test_a_disk_that_is_too_small_is_an_error_of_the_first_rank_and_the_group_goes_on(folder, by_two):
    first, second = (results[0] for results in by_two)  # of "a"
    saving, exporting = first["errors"]
    assert saving == f"{folder / 'full'} cannot be written (File too large)"
    assert exporting.startswith(f"{folder / 'export'} cannot be written (")
    assert "File too large" in exporting
    assert second["errors"] == []
    assert [len(each["metrics"]) for each in (first, second)] == [4, 4]
    assert first["metrics"] == second["metrics"]


def test_what_is_of_another_model_or_not_there_is_named(folder, by_one):
    other, nothing = by_one["errors"]
    assert other.startswith(f"{folder / 'lora' / 'policy'} cannot be loaded: it is of another model: lm.")
    assert nothing.startswith(f"{folder / 'nothing' / 'policy'} cannot be loaded: [Errno 2] No such file")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a run's files and two checkpoints of 12 MB, and whether it is one.

    Where none can be mounted it is a folder without a bound.
    """
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    is_small = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield place, is_small
    if is_small:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long
def test_a_run_goes_on_from_a_full_disk_past_a_damaged_checkpoint_with_another_cut(small_disk, train, small):
    """Two ranks with ZeRO stage 2 fill the disk with a third checkpoint; then the second one is damaged."""
    place, is_small = small_disk
    overrides = (*small, "rollout.num_workers=1", "checkpoint.every_steps=1")
    first = train(*overrides, f"run.num_steps={4 if is_small else 2}", folder=place / "run")
    folder = first.folder / "checkpoints"
    kept = ["step-000001", "step-000002"]
    if is_small:
        assert first.returncode == StorageError.exit_code, first.output
        (error,) = [line for line in first.output.splitlines() if line.startswith("error:")]
        assert f"no checkpoint can be saved before step 3 in {folder}, where " in error
        assert "(No space left on device); checkpoint step-000002 is whole; make room there" in error
        assert "Traceback" not in first.output
        assert [path.name for path in list_checkpoints(folder)] == kept
        assert all(find_damage(path) is None for path in list_checkpoints(folder, with_best=True))
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
    first_metrics = first.metrics

    damaged = folder / "step-000002" / "policy" / "exp_avg.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    cut = ("learner.num_workers=1", "learner.zero_stage=3")
    resumed = train(*overrides, *cut, "run.num_steps=4", "--resume", folder=first.folder)
    assert resumed.returncode == 0, resumed.output
    output = " ".join(resumed.output.split())
    assert "step-000002 is damaged (policy/exp_avg.safetensors has other bytes than were written)" in output
    assert (
        "step-000001 was written by 2 learner rank(s) with ZeRO stage 2, and 1 with stage 3 go on" in output
    )
    assert [step["step"] for step in resumed.metrics] == [0, 1, 2, 3]
    assert resumed.metrics[0] == first_metrics[0]
    for again, before in zip(resumed.metrics[1:], first_metrics[1:], strict=False):
        assert again["reward_mean"] == before["reward_mean"], "from the journal"
        assert again["policy_loss"] == pytest.approx(before["policy_loss"], abs=1e-4)
    assert [path.name for path in list_checkpoints(folder)] == ["step-000003", "step-000004"]
    assert all(find_damage(path) is None for path in list_checkpoints(folder, with_best=True))
