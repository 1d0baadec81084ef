"""What is decided before a worker starts: which checkpoint each role gets, and which prompts are shown."""

from __future__ import annotations

import pytest

from rlhf_dist.config import parse_config
from rlhf_dist.driver.preparation import Models, check_inputs, initial_policy, prepare, role_models, shares
from rlhf_dist.driver.run import _num_sample_answers, _sample_rows
from rlhf_dist.driver.run_folder import RunFolder, write_json
from rlhf_dist.errors import ConfigError, ModelError, StorageError
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm, save_tiny_reward_model

FUNCTION = {"kind": "function", "path": "rlhf_dist.tasks.support_desk:reward"}
REWARD_MODEL = {"kind": "model", "model": "hub/reward"}


def config(**sections):
    tree = {
        "run": {"dir": "runs/x"},
        "policy": {"model": "task:support-desk"},
        "reward": [FUNCTION],
        "data": {"prompts": "p.jsonl"},
    }
    return parse_config(tree | sections, source="test")


# ------------------------------------------------------------------------------------------ role_models


def test_value_and_reference_start_from_the_policy():
    assert role_models(config(), "start") == Models(policy="start", value="start", reference="start")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a reward model with its tokenizer, and one with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_causal_lm(folder / "policy", ["one two three"] * 3, seed=0, vocab_size=300)
    save_tiny_reward_model(folder / "related", ["one two three"] * 3, seed=0, vocab_size=300)
    save_tiny_reward_model(folder / "foreign", ["four five six seven"] * 3, seed=0, vocab_size=320)
    return folder


def test_the_value_model_starts_from_the_first_reward_model_that_reads_the_policys_tokens(models):
    foreign = REWARD_MODEL | {"model": str(models / "foreign"), "name": "foreign"}
    related = REWARD_MODEL | {"model": str(models / "related"), "name": "related"}
    policy = str(models / "policy")
    assert role_models(config(reward=[FUNCTION, foreign, related]), policy).value == related["model"]
    assert role_models(config(reward=[FUNCTION, foreign]), policy).value == policy


@pytest.mark.parametrize("role", ["value", "reference"])
def test_a_value_or_reference_model_of_another_family_is_refused(models, role):
    chosen = config(**{role: {"model": str(models / "foreign")}})
    with pytest.raises(ModelError, match=f"^{role} model .* has another tokenizer than the policy"):
        prepare(chosen, str(models / "policy"))


def test_configured_checkpoints_come_first():
    chosen = config(reward=[REWARD_MODEL], value={"model": "hub/value"}, reference={"model": "hub/reference"})
    assert role_models(chosen, "start") == Models("start", "hub/value", "hub/reference")


def test_a_role_that_the_algorithm_does_not_need_gets_none():
    chosen = config(algorithm={"name": "ppo", "kl": {"coef": 0}}, reference={"model": "hub/reference"})
    assert role_models(chosen, "start") == Models("start", "start", None)


# ----------------------------------------------------------------------------------------- check_inputs


def test_inputs_that_are_there_are_accepted():
    check_inputs(config())


def test_adapters_for_layers_that_the_policy_has_not_are_found_before_anything_starts(models):
    policy = str(models / "policy")
    message = "^learner.lora.target_modules: 'queries' names no linear layer of policy model '{}'"
    lora = {"lora": {"target_modules": ["v_proj", "queries"]}}
    with pytest.raises(ModelError, match=message.format(policy)):
        check_inputs(config(policy={"model": policy}, learner=lora))
    with pytest.raises(ModelError, match=message.format("task:support-desk")):
        prepare(config(learner=lora), policy)
    check_inputs(config(policy={"model": policy}, learner={"lora": {"target_modules": ["v_proj"]}}))


def test_a_reward_function_that_is_not_there_is_found_before_anything_starts():
    with pytest.raises(ConfigError, match="has no function 'rewrad'"):
        check_inputs(config(reward=[FUNCTION | {"path": "rlhf_dist.tasks.support_desk:rewrad"}]))


@pytest.mark.parametrize(
    ("section", "value", "role"),
    [
        ("policy", {"model": "{}"}, "policy"),
        ("value", {"model": "{}"}, "value"),
        ("reference", {"model": "{}"}, "reference"),
        ("reward", [{"kind": "model", "model": "{}"}], "reward"),
    ],
)
def test_a_checkpoint_folder_that_is_not_there_is_named_with_its_role(section, value, role, tmp_path):
    missing = str(tmp_path / "missing")
    filled = [value[0] | {"model": missing}] if isinstance(value, list) else {"model": missing}
    with pytest.raises(ModelError, match=f"^{role} model: folder '{missing}' does not exist$"):
        check_inputs(config(**{section: filled}))


def test_a_folder_without_a_configuration_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json; it is not a checkpoint folder"):
        check_inputs(config(policy={"model": str(tmp_path)}))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_trust_region_needs_parameters_that_are_whole(zero_stage):
    chosen = config(algorithm={"name": "trpo"}, learner={"zero_stage": zero_stage})
    with pytest.raises(ConfigError) as caught:
        check_inputs(chosen)
    assert str(caught.value) == (
        "algorithm.name=trpo steps on parameters that are whole on every rank, not on those of "
        f"learner.zero_stage={zero_stage}; set learner.zero_stage=0"
    )


@pytest.mark.parametrize("learner", [{"dtype": "bfloat16"}, {"gpus_per_worker": 1}])
def test_a_trust_region_needs_parameters_in_float32(learner):
    chosen = config(algorithm={"name": "trpo"}, learner={"zero_stage": 0} | learner)
    with pytest.raises(ConfigError) as caught:
        check_inputs(chosen)
    assert str(caught.value) == (
        "algorithm.name=trpo steps on float32 parameters, and the learner's are bfloat16; "
        "set learner.dtype=float32"
    )
    check_inputs(
        config(algorithm={"name": "trpo"}, learner={"zero_stage": 0} | learner | {"dtype": "float32"})
    )


# ------------------------------------------------------------------------------------- shares and rows


def test_shares_are_by_role():
    chosen = shares(config(rollout={"num_workers": 3}, learner={"num_workers": 1}), node_cpus=10)
    assert {role: (share.role, share.num_workers) for role, share in chosen.items()} == {
        "rollout": ("rollout", 3),
        "scoring": ("scoring", 1),
        "learner": ("learner", 1),
    }


def test_what_is_to_be_repeatable_is_sampled_and_scored_by_one_thread_on_cpu():
    deterministic = {"run": {"dir": "runs/x", "deterministic": True}}
    others = {"scoring": {"gpus_per_worker": 1}, "learner": {"num_workers": 1}}
    chosen = shares(config(**deterministic, **others), node_cpus=10)
    assert {role: share.threads for role, share in chosen.items()} == {
        "rollout": 1,
        "scoring": 10,
        "learner": 10,
    }


@pytest.mark.parametrize(
    ("num_rows", "count", "rows"),
    [
        (101, 3, [0, 50, 100]),
        (10, 4, [0, 3, 6, 9]),
        (100, 1, [0]),
        (2, 5, [0, 1]),
        (1, 3, [0]),
        (7, 0, []),
    ],
)
def test_sample_prompts_are_spread_evenly_over_the_data_set(num_rows, count, rows):
    assert _sample_rows(num_rows, count) == rows


def test_a_resumed_run_answers_the_prompts_that_were_answered_before_training(tmp_path):
    folder = RunFolder(tmp_path)
    rows = _sample_rows(100, 3)
    write_json(folder.answers, {"prompts": [f"prompt {row}" for row in rows], "before": ["a", "b", "c"]})
    changed = config(run={"dir": "runs/x", "num_sample_answers": 5})
    assert _sample_rows(100, _num_sample_answers(changed, folder, first_step=2)) == rows
    assert _num_sample_answers(changed, folder, first_step=0) == 5, "they are answered anew"


def test_a_model_that_cannot_be_written_is_one_message(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/policy cannot be written \(.+\); make room there"):
        initial_policy(config(), tmp_path / "file" / "policy")
