"""What a resumed run may change, what it may not, and what it says of steps that it repeats."""

from __future__ import annotations

import pyarrow as pa
import pytest
from rich.console import Console

from rlhf_dist.config import Difference, to_yaml
from rlhf_dist.data.prompts import PromptSet
from rlhf_dist.driver.preparation import prepare
from rlhf_dist.driver.resumption import (
    change_notes,
    check_prompts,
    check_settings,
    recorded_policies,
    write_fingerprint,
)
from rlhf_dist.driver.run import run
from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.errors import ConfigError, DataError, RunError
from rlhf_dist.experience import steps
from rlhf_dist.experience.steps import StepsLog
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm

DATA = {"prompts": "task:support-desk"}


@pytest.fixture
def folder(tmp_path, config):
    """A run that was begun."""
    folder = RunFolder(tmp_path / "run")
    folder.journal.mkdir(parents=True)
    (folder.journal / "steps.jsonl").touch()
    folder.marker.touch()
    folder.config.write_text(to_yaml(config()))
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()} | {
        path: None for path in folder.root.rglob("*") if path.is_dir()
    }


# ---------------------------------------------------------------------------------------------- settings


def test_the_same_settings_differ_in_nothing(folder, config):
    assert check_settings(folder, config()) == []


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"run": {"dir": "runs/x", "seed": 1}}, "run.seed: 0 -> 1; set run.seed=0"),
        (
            {"policy": {"model": "hub/other"}},
            "policy.model: task:support-desk -> hub/other; set policy.model=task:support-desk",
        ),
        (
            {"data": {"prompts": "other.jsonl"}},
            "data.prompts: task:support-desk -> other.jsonl; set data.prompts=task:support-desk",
        ),
        ({"data": DATA | {"shuffle": False}}, "data.shuffle: true -> false; set data.shuffle=true"),
        ({"data": DATA | {"limit": 9}}, "data.limit: null -> 9; set data.limit=null"),
        (
            {"data": DATA | {"chat_template": "never"}},
            "data.chat_template: auto -> never; set data.chat_template=auto",
        ),
        (
            {"sft": {"demonstrations": "task:support-desk", "num_steps": 3}},
            "sft.num_steps: 100 -> 3; set sft.num_steps=100",
        ),
        (
            {"rollout": {"prompts_per_step": 16}},
            "rollout.prompts_per_step: 32 -> 16; set rollout.prompts_per_step=32",
        ),
        (
            {"rollout": {"samples_per_prompt": 4}},
            "rollout.samples_per_prompt: 1 -> 4; set rollout.samples_per_prompt=1",
        ),
        ({"algorithm": {"name": "reinforce"}}, "algorithm.name: ppo -> reinforce; set algorithm.name=ppo"),
    ],
)
def test_what_gives_ordinals_and_samples_their_meaning_may_not_change(sections, line, folder, config):
    with pytest.raises(ConfigError) as caught:
        check_settings(folder, config(**sections))
    assert str(caught.value).splitlines() == [
        f"run folder {folder.root} cannot be resumed with other prompts or another start:",
        f"  {line}",
        "  or set run.dir to a new folder, for a new run",
    ]


def test_a_supervised_stage_may_not_be_left_out(folder, config):
    with pytest.raises(ConfigError, match=r"\n  sft: \{.*\} -> null; set sft='\{.*\}'\n"):
        check_settings(folder, config(sft=None))


def test_every_change_that_is_refused_has_its_line(folder, config):
    changed = config(run={"dir": "runs/x", "seed": 1}, rollout={"prompts_per_step": 16})
    with pytest.raises(ConfigError, match=r"run\.seed: 0 -> 1(.|\n)*prompts_per_step: 32 -> 16"):
        check_settings(folder, changed)


def test_other_settings_may_change_and_are_said(folder, config):
    path = "a_package_with_a_long_name.and_a_module_with_another_one:reward"
    changed = config(
        run={"dir": "elsewhere", "num_steps": 40},
        reward=[{"path": path, "weight": 2}],
        learner={"num_workers": 1, "zero_stage": 3, "lora": {"rank": 4}},
        experience={"max_staleness": 2},
    )
    assert change_notes(check_settings(folder, changed)) == [
        "run.num_steps: 9 -> 40",
        f"reward.0.path: rlhf_dist.tasks.support_desk:reward -> {path[:59]}…",
        "reward.0.weight: 1.0 -> 2.0",
        "learner.num_workers: 2 -> 1",
        "learner.zero_stage: 2 -> 3",
        'learner.lora: null -> {"rank": 4, "alpha": 16, "target_modules": null}',
        "experience.max_staleness: 0 -> 2",
    ]


def test_keys_that_the_run_did_not_know_yet_or_that_are_gone_do_not_count(folder, config):
    text = to_yaml(config()).replace("prompts_per_step:", "prompts_a_step:")
    folder.config.write_text(text)
    assert check_settings(folder, config(rollout={"prompts_per_step": 16})) == []


def test_a_folder_without_its_settings_is_resumed_as_it_is(folder, config):
    folder.config.unlink()
    assert check_settings(folder, config()) == []


def test_a_refused_resume_leaves_the_folder_as_it_was(folder, config):
    (folder.root / ".lock").touch()
    before = contents(folder)
    changed = config(run={"dir": str(folder.root), "seed": 1})
    with pytest.raises(ConfigError, match="cannot be resumed with other prompts"):
        run(changed, address=None, if_exists="resume", console=Console(quiet=True), verbose=False)
    assert contents(folder) == before


# ----------------------------------------------------------------------------------------------- prompts


def prompt_set(*tokens):
    column = pa.array(tokens, type=pa.list_(pa.int32()))
    return PromptSet(pa.table({"prompt_tokens": column}), num_skipped=0)


def test_the_same_prompts_are_resumed(folder, config):
    write_fingerprint(folder, prompt_set([1, 2], [3]))
    check_prompts(folder, config(), prompt_set([1, 2], [3]))


@pytest.mark.parametrize(
    ("now", "numbers"),
    [
        (([1, 2], [3], [4]), "2 then, 3 now"),
        (([1], [2, 3]), "2 then, 2 now, with other tokens"),
    ],
)
def test_other_prompts_are_refused_and_their_source_is_named(now, numbers, folder, config):
    write_fingerprint(folder, prompt_set([1, 2], [3]))
    with pytest.raises(DataError) as caught:
        check_prompts(folder, config(data={"prompts": "mine.jsonl"}), prompt_set(*now))
    assert str(caught.value) == (
        f"data.prompts=mine.jsonl: these are not the prompts that the run in {folder.root} began with "
        f"({numbers}), and the journal counts by those; bring back the data, the tokenizer and the limits on "
        "a prompt's length as they were, or set run.dir to a new folder"
    )


def test_a_folder_that_does_not_know_its_prompts_is_resumed(folder, config):
    check_prompts(folder, config(), prompt_set([1]))


def test_a_line_more_in_the_file_refuses_the_resume_and_the_folder_stays(folder, config, tmp_path):
    save_tiny_causal_lm(tmp_path / "policy", ["one two three"] * 3, seed=0, vocab_size=300)
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "one"}\n')
    settings = config(
        run={"dir": str(folder.root)},
        policy={"model": str(tmp_path / "policy")},
        data={"prompts": str(source)},
        sft=None,
    )
    folder.config.write_text(to_yaml(settings))
    write_fingerprint(folder, prepare(settings, settings.policy.model).prompts)
    (folder.root / ".lock").touch()
    before = contents(folder)
    source.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl: these are not .* \(1 then, 2 now\)"):
        run(settings, address=None, if_exists="resume", console=Console(quiet=True), verbose=False)
    assert contents(folder) == before


# ------------------------------------------------------------------------------------- repeated steps


@pytest.fixture
def trained(folder):
    """Steps 0 to 3 were trained, step 2 by two processes, and step 4 was begun."""
    log = StepsLog(folder.journal)
    for step in range(5):
        log.append([steps.leased_record(step, [step], [], step)])
    for step, digest in [(0, "a"), (1, "b"), (2, "of the first"), (3, "d"), (2, "c")]:
        log.append([steps.trained_record(step, digest)])
    log.close()
    return folder


def deterministic(config, **learner):
    return config(run={"dir": "runs/x", "deterministic": True}, learner=learner)


def test_a_repeated_step_that_gives_another_policy_is_said(trained, config):
    said = []
    recorded = recorded_policies(trained, config(), 1, [], said.append)
    assert len(recorded) == 3, "steps 1 to 3 are repeated"
    for step, digest in enumerate(["another", "b", "c", "another", "the first", "the first"]):
        recorded.check(step, digest)
    assert said == ["step 3, done once more, gave another policy than before"]


def test_where_the_same_policy_is_promised_another_one_ends_the_run(trained, config):
    recorded = recorded_policies(trained, deterministic(config), 1, [], print)
    recorded.check(1, "b")
    with pytest.raises(RunError) as caught:
        recorded.check(2, "another")
    assert str(caught.value) == (
        "step 2, done once more, gave another policy than before, where run.deterministic=true "
        "promises the same: the machine, the number of threads (learner.threads_per_worker), the software or "
        "a setting is another; go on as it was, or resume with run.deterministic=false to go on with the new "
        "policy"
    )


@pytest.mark.parametrize(
    ("learner", "changes"), [({"gpus_per_worker": 1}, []), ({}, [Difference("learner.num_workers", 1, 2)])]
)
def test_on_gpus_and_with_other_settings_another_policy_is_only_said(learner, changes, trained, config):
    said = []
    recorded = recorded_policies(trained, deterministic(config, **learner), 1, changes, said.append)
    recorded.check(2, "another")
    assert len(said) == 1


def test_a_new_run_repeats_nothing(tmp_path, config):
    recorded = recorded_policies(RunFolder(tmp_path), deterministic(config), 0, [], print)
    recorded.check(0, "any")
    assert len(recorded) == 0


def test_a_kl_to_a_reference_that_the_samples_were_scored_without_is_refused(folder, config):
    folder.config.write_text(to_yaml(config(algorithm={"name": "ppo", "kl": {"coef": 0}})))
    check_settings(folder, config(algorithm={"name": "ppo", "kl": {"coef": 0}, "num_epochs": 7}))
    with pytest.raises(
        ConfigError, match=r"needs the reference's log-probabilities.*set algorithm.kl.coef=0"
    ):
        check_settings(folder, config(algorithm={"name": "ppo", "kl": {"coef": 0.1}}))
