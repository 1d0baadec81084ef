"""Everything that can be checked and made before a worker starts: models, prompts, rewards, placement.

What is wrong with the user's input is found here, in seconds, and not minutes later in a worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from rlhf_dist.algorithms import make_algorithm
from rlhf_dist.cluster.placement import RoleShare, share_out
from rlhf_dist.config import Config
from rlhf_dist.data.prompts import PromptSet, load_prompts
from rlhf_dist.data.sources import TASK_PREFIX, check_source, task_function
from rlhf_dist.engines.loading import (
    check_checkpoint,
    context_limit,
    load_tokenizer,
    same_tokens,
    torch_dtype,
)
from rlhf_dist.engines.lora import check_targets
from rlhf_dist.engines.settings import WorkerSettings
from rlhf_dist.errors import ConfigError, ModelError, StorageError
from rlhf_dist.rewards.functions import load_function
from rlhf_dist.rewards.settings import FunctionRewardSettings, ModelRewardSettings


@dataclass(frozen=True)
class Models:
    """The checkpoint of each role. None: the role is not needed."""

    policy: str
    value: str | None
    reference: str | None


@dataclass(frozen=True)
class Prepared:
    """A checked run."""

    prompts: PromptSet
    context_tokens: int


def initial_policy(config: Config, folder: Path) -> str:
    """The policy's checkpoint; a built-in task's untrained model is made in `folder` unless it is there.

    Raises:
        DataError: there is no such task.
        StorageError: the model cannot be written.
    """
    model = config.policy.model
    if not model.startswith(TASK_PREFIX):
        return model
    if not (folder / "config.json").exists():
        make = task_function(model, "make_policy")
        try:
            make(folder, seed=config.run.seed)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{folder} cannot be written ({error}); make room there, then start the run again"
            ) from error
    return str(folder)


def check_outside(config: Config, folder: Path) -> None:
    """Refuse to read from a run folder that is about to be cleared.

    Raises:
        ConfigError: naming what lies in it.
    """
    sources = {
        "policy.model": config.policy.model,
        "value.model": config.value.model,
        "reference.model": config.reference.model,
        "data.prompts": config.data.prompts,
        "sft.demonstrations": config.sft and config.sft.demonstrations,
    } | {
        f"reward.{i}.model": reward.model
        for i, reward in enumerate(config.reward)
        if isinstance(reward, ModelRewardSettings)
    }
    for key, source in sources.items():
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{key}={source} lies in the run folder {folder}, which a new run replaces; set run.dir"
            )


def check_sources(config: Config) -> None:
    """Make sure that the files and tasks are there that a new run reads its data from.

    Raises:
        DataError: one is not.
    """
    check_source(config.data.prompts)
    if config.sft is not None:
        check_source(config.sft.demonstrations, kind="demonstrations")


def prepare(config: Config, policy: str) -> Prepared:
    """Check every input of a run and load its prompts.

    Args:
        policy: checkpoint of the starting policy.

    Raises:
        RunError: naming what cannot be used and how to mend it.
    """
    check_inputs(config)
    if config.policy.model.startswith(TASK_PREFIX):
        _check_policy(config, policy)
    tokenizer = load_tokenizer(policy, "policy")
    for role, model in (("value", config.value.model), ("reference", config.reference.model)):
        if model is not None and not same_tokens(load_tokenizer(model, role), tokenizer):
            raise ModelError(
                f"{role} model {model!r} has another tokenizer than the policy, whose tokens it would be "
                f"given; name a model of the same family, or leave {role}.model out"
            )
    limit = context_tokens(config, policy)
    max_prompt_tokens = _max_prompt_tokens(config, limit)
    return Prepared(load_prompts(config.data, tokenizer, max_prompt_tokens=max_prompt_tokens), limit)


def check_inputs(config: Config) -> None:
    """What can be checked of the learner, of models and of rewards without loading them.

    Raises:
        RunError: naming what cannot be used.
    """
    check_trust_region(config)
    for reward in config.reward:
        if isinstance(reward, FunctionRewardSettings):
            load_function(reward.path)
        else:
            check_checkpoint(reward.model, "reward")
    for role, model in (("value", config.value.model), ("reference", config.reference.model)):
        if model is not None:
            check_checkpoint(model, role)
    if not config.policy.model.startswith(TASK_PREFIX):
        _check_policy(config, config.policy.model)


def _check_policy(config: Config, model: str) -> None:
    """Check a checkpoint without loading its weights.

    Raises:
        ModelError: it cannot be loaded, or has no such layers as are to have adapters.
    """
    check_checkpoint(model, "policy")
    if config.learner.lora is not None:
        check_targets(model, config.learner.lora, name=config.policy.model)


def check_trust_region(config: Config) -> None:
    """A step in a trust region is written into the parameters, of which nothing else may hold a copy.

    Raises:
        ConfigError: they are partitioned, or not float32.
    """
    if make_algorithm(config.algorithm).needs.trust_region is None:
        return
    name, learner = config.algorithm.name, config.learner
    if learner.zero_stage != 0:
        raise ConfigError(
            f"algorithm.name={name} steps on parameters that are whole on every rank, not on those of "
            f"learner.zero_stage={learner.zero_stage}; set learner.zero_stage=0"
        )
    dtype = str(torch_dtype(learner.dtype, on_gpu=learner.gpus_per_worker > 0)).removeprefix("torch.")
    if dtype != "float32":
        raise ConfigError(
            f"algorithm.name={name} steps on float32 parameters, and the learner's are {dtype}; "
            "set learner.dtype=float32"
        )


def role_models(config: Config, policy: str) -> Models:
    """Which checkpoint each role starts from.

    Args:
        policy: the starting policy, after the supervised stage if there is one.
    """
    needs = make_algorithm(config.algorithm).needs
    return Models(
        policy=policy,
        value=(config.value.model or _value_start(config, policy)) if needs.value_model else None,
        reference=(config.reference.model or policy) if needs.reference else None,
    )


def _value_start(config: Config, policy: str) -> str:
    """The first reward model that reads the policy's tokens, else the policy."""
    for reward in config.reward:
        if isinstance(reward, ModelRewardSettings) and same_tokens(
            load_tokenizer(reward.model, "reward"), load_tokenizer(policy, "policy")
        ):
            return reward.model
    return policy


def shares(config: Config, *, node_cpus: float) -> dict[str, RoleShare]:
    """What each role's workers reserve.

    With `run.deterministic` a sample's numbers may not depend on what is computed beside it, which on CPU
    takes one thread: several share out sums by how much there is to do.
    """
    roles: dict[str, WorkerSettings] = {
        "rollout": config.rollout,
        "scoring": config.scoring,
        "learner": config.learner,
    }
    if config.run.deterministic:
        for role in ("rollout", "scoring"):
            if roles[role].gpus_per_worker == 0:
                roles[role] = roles[role].model_copy(update={"threads_per_worker": 1})
    return {share.role: share for share in share_out(roles, node_cpus=node_cpus)}


def context_tokens(config: Config, policy: str) -> int:
    """Prompt and response together, at most: what the configuration asks for, else the policy's own limit.

    Raises:
        ConfigError: the configuration asks for more than the policy has, or neither says.
    """
    asked, limit = config.rollout.context_tokens, context_limit(policy, "policy")
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"rollout.context_tokens={asked} is above the policy's limit of {limit}")
    if asked is None and limit is None:
        raise ConfigError(f"policy {policy!r} does not state its context limit; set rollout.context_tokens")
    return asked or limit or 0


def _max_prompt_tokens(config: Config, limit: int) -> int:
    max_tokens = config.rollout.sampling.max_tokens
    room = limit - max_tokens
    if room < 1:
        raise ConfigError(
            f"rollout.sampling.max_tokens={max_tokens} leaves no room for a prompt in a context of "
            f"{limit} tokens; lower it"
        )
    asked = config.data.max_prompt_tokens
    if asked is not None and asked > room:
        raise ConfigError(
            f"data.max_prompt_tokens={asked} and rollout.sampling.max_tokens={max_tokens} together are above "
            f"the context of {limit} tokens"
        )
    return asked or room
