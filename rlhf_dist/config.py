"""The run's configuration: YAML in, `key=value` on the command line over it, one typed frozen tree out.

Each section is defined beside the code that reads it; `Config` only composes them. An unknown key is an
error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from rlhf_dist import algorithms
from rlhf_dist.algorithms.base import AlgorithmSettings
from rlhf_dist.config_mistakes import Mistakes
from rlhf_dist.data.settings import DataSettings, SFTSettings
from rlhf_dist.engines.settings import LearnerSettings, RolloutSettings, ScoringSettings
from rlhf_dist.errors import ConfigError
from rlhf_dist.experience.settings import ExperienceSettings
from rlhf_dist.rewards.settings import RewardSettings
from rlhf_dist.settings import Section
from rlhf_dist.types import Transport


class RunSettings(Section):
    """The run as a whole."""

    dir: Path
    """Run folder: configuration, metrics, checkpoints and the trained policy. On several nodes it must be
    on a file system that all of them share."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of prompts, every sampling seed and every shuffle."""
    num_steps: int = Field(default=100, ge=1)
    """Learner steps."""
    deterministic: bool = False
    """Give up speed where it costs repeatability. On CPU, synchronous training then ends with the same
    parameters, bit for bit, every time; asynchronous training at least consumes prompts in order. Rollout and
    scoring workers on CPU have one thread each, however many cores there are."""
    num_sample_answers: int = Field(default=3, ge=0)
    """Prompts whose greedy answers are shown before and after training."""


class PolicySettings(Section):
    """The model that is trained."""

    model: str = Field(min_length=1)
    """Checkpoint folder, hub name, or `task:NAME` for the small untrained model of a built-in task."""


class ValueSettings(Section):
    """The critic."""

    model: str | None = None
    """Checkpoint folder or hub name, with the policy's tokenizer. None: the first reward model that has it,
    else the starting policy."""


class ReferenceSettings(Section):
    """The policy that the KL is measured to."""

    model: str | None = None
    """Checkpoint folder or hub name, with the policy's tokenizer. None: the starting policy."""


class WeightsSettings(Section):
    """Weight snapshots from the learner to the rollout workers."""

    transport: Transport = "auto"
    """Where snapshots are and what carries them. `shared_memory`: in the memory of the learner's node, mapped
    there, copied to other nodes once each. `ipc`: in the learner's GPU, mapped by engines on the same GPU.
    `nccl`: in the learner's GPU, sent to the engines' GPUs, on other nodes too. `auto`: where the learner and
    the engines are on GPUs, `ipc` for each engine that shares the learner's and `nccl` for the others; else
    `shared_memory`. Except with that, the learner's first GPU needs room for two snapshots."""

    probe_tolerance_nats: float | None = Field(default=None, gt=0)
    """Largest difference between a worker's and the learner's log-probabilities of the probe sequence.
    None: by the engine's dtype, 1e-4 in float32."""


class CheckpointSettings(Section):
    """Checkpoints of the learner."""

    every_steps: int = Field(default=20, ge=1)
    """Learner steps between two checkpoints; the last step is always saved."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that stay on disk to go on from; the journal keeps what they need."""
    best_metric: str | None = "reward_mean"
    """A copy of the checkpoint that is best by this metric of `metrics.jsonl` stays as well, whatever
    `keep_last` is. It is the metric of the step before, so of the policy that drew that step's samples.
    None: no such copy."""
    best_mode: Literal["max", "min"] = "max"
    """Whether a high or a low value is the best."""


class ClusterSettings(Section):
    """Deadlines. Each is the longest one call may take before the run stops and names it."""

    placement_timeout_s: float = Field(default=60, gt=0)
    """Waiting for the cluster to reserve a role's CPUs and GPUs."""
    start_timeout_s: float = Field(default=600, gt=0)
    """A worker's start: imports, loading its model, reserving its cache."""
    generate_timeout_s: float = Field(default=1800, gt=0)
    """Between two batches of finished samples from the rollout workers."""
    score_timeout_s: float = Field(default=900, gt=0)
    """Scoring one batch."""
    step_timeout_s: float = Field(default=3600, gt=0)
    """One learner step, one supervised stage, or one collective inside them."""
    weights_timeout_s: float = Field(default=900, gt=0)
    """Taking a snapshot, or loading and proving one."""
    checkpoint_timeout_s: float = Field(default=1800, gt=0)
    """Writing or reading a checkpoint or an export."""


class RecoverySettings(Section):
    """What happens when a worker, a role or a node is lost."""

    max_restarts: int = Field(default=10, ge=0)
    """Restarts of one worker within `window_s`, and however far apart between two learner steps; one more
    stops the run. 0: the first loss does. The learner's ranks are started again together and count as one."""
    window_s: float = Field(default=600, gt=0)
    """What `max_restarts` counts over."""
    backoff_s: float = Field(default=1, ge=0)
    """Before a worker's second restart within the window; twice as long before each further one, up to a
    minute. The first one is at once."""
    heartbeat_interval_s: float = Field(default=5, gt=0)
    """Between a worker's answer and the next question whether it lives."""
    heartbeat_timeout_s: float = Field(default=60, gt=0)
    """A worker that has not answered for so long is replaced: it was stopped, it hangs, or it is cut off."""
    grace_period_s: float = Field(default=30, ge=0)
    """From SIGTERM to the end: for the step under way and a last checkpoint. Where they take longer the run
    ends without, and resumes from the checkpoint before."""


def _algorithm_settings(value: Any) -> Any:
    if isinstance(value, dict):
        name = value.get("name", "ppo")
        if not isinstance(name, str) or name not in algorithms.algorithm_names():
            raise ValueError(
                f"name={name!r} is not known; there are: {', '.join(algorithms.algorithm_names())}"
            )
        return algorithms.settings_class(name).model_validate(value)
    return value


class Config(Section):
    """A run."""

    run: RunSettings
    policy: PolicySettings
    value: ValueSettings = ValueSettings()
    reference: ReferenceSettings = ReferenceSettings()
    reward: tuple[RewardSettings, ...]
    data: DataSettings
    sft: SFTSettings | None = None
    rollout: RolloutSettings = RolloutSettings()
    scoring: ScoringSettings = ScoringSettings()
    learner: LearnerSettings = LearnerSettings()
    algorithm: Annotated[SerializeAsAny[AlgorithmSettings], BeforeValidator(_algorithm_settings)] = Field(
        default_factory=lambda: algorithms.settings_class("ppo")(name="ppo")
    )
    experience: ExperienceSettings = ExperienceSettings()
    weights: WeightsSettings = WeightsSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
    recovery: RecoverySettings = RecoverySettings()

    @field_validator("reward", mode="before")
    @classmethod
    def _kinds(cls, entries: Any) -> Any:
        """An entry without `kind` is a model if it names one, else a function."""
        if not isinstance(entries, list | tuple):
            raise ValueError("it is a list of parts; write `- {path: package.module:function}`")
        return [
            {"kind": "model" if "model" in entry else "function"} | entry
            if isinstance(entry, dict)
            else entry
            for entry in entries
        ]

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.reward:
            raise ValueError("`reward` is an empty list; it must have at least one part")
        labels = [reward.label for reward in self.reward]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two parts of `reward` have the same name: {labels}; set `name` of one")
        num_samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.algorithm.num_minibatches > num_samples:
            raise ValueError(
                f"algorithm.num_minibatches={self.algorithm.num_minibatches} is more than the "
                f"{num_samples} samples of a step (rollout.prompts_per_step x rollout.samples_per_prompt)"
            )
        if self.rollout.samples_per_prompt < self.algorithm.min_samples_per_prompt:
            raise ValueError(
                f"algorithm.name={self.algorithm.name} compares responses to the same prompt: "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt} must be at least "
                f"{self.algorithm.min_samples_per_prompt}"
            )
        if not algorithms.make_algorithm(self.algorithm).trains_policy(self.run.num_steps - 1):
            raise ValueError(
                f"algorithm.value_warmup_steps leaves none of the run.num_steps={self.run.num_steps} steps "
                "to the policy"
            )
        steps_ahead = self.experience.max_staleness + 1
        if self.experience.max_samples < steps_ahead * num_samples:
            raise ValueError(
                f"experience.max_samples={self.experience.max_samples} cannot hold the "
                f"{steps_ahead * num_samples} samples of {steps_ahead} step(s): experience.max_staleness + 1 "
                "times rollout.prompts_per_step x rollout.samples_per_prompt"
            )
        slowest_s = self.cluster.step_timeout_s + self.cluster.weights_timeout_s
        if self.experience.lease_timeout_s < slowest_s:
            raise ValueError(
                f"experience.lease_timeout_s={self.experience.lease_timeout_s:g} is less than a learner step "
                f"may take, cluster.step_timeout_s + cluster.weights_timeout_s = {slowest_s:g}"
            )
        if self.experience.max_staleness > 0 and self.rollout.sampling.temperature_final is not None:
            raise ValueError(
                "rollout.sampling.temperature_final changes the temperature from step to step, and with "
                f"experience.max_staleness={self.experience.max_staleness} steps overlap; drop one of them"
            )
        if self.weights.transport in ("ipc", "nccl") and not self._on_gpus:
            raise ValueError(
                f"weights.transport={self.weights.transport} is from GPU to GPU; "
                f"learner.gpus_per_worker={self.learner.gpus_per_worker:g} and "
                f"rollout.gpus_per_worker={self.rollout.gpus_per_worker:g} must both be above 0; "
                "or use weights.transport=auto"
            )
        for role, settings in (("rollout", self.rollout), ("scoring", self.scoring)):
            on_threads = settings.gpus_per_worker == 0 and (settings.threads_per_worker or 1) > 1
            if self.run.deterministic and on_threads:
                raise ValueError(
                    f"{role}.threads_per_worker={settings.threads_per_worker} and run.deterministic exclude "
                    "each other: several threads share out sums by what is computed beside a sample; drop one"
                )
        if self.rollout.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature=0 always gives the same response: nothing to learn from"
            )
        return self

    @property
    def snapshots_on_gpu(self) -> bool:
        """Whether weight snapshots stay in the learner's GPU."""
        return self.weights.transport != "shared_memory" and self._on_gpus

    @property
    def _on_gpus(self) -> bool:
        return self.learner.gpus_per_worker > 0 and self.rollout.gpus_per_worker > 0


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides, whose values are YAML, too.

    Raises:
        ConfigError: the file is missing or broken, a key is unknown, a value has the wrong type or range.
    """
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], *, source: str) -> Config:
    """Validate a configuration tree.

    Raises:
        ConfigError: with a line for each thing that is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = Mistakes(Config, _algorithm_sections(tree)).explained(error.errors())
        raise ConfigError(
            "\n".join([f"{source} cannot be used:", *(f"  {line}" for line in lines)])
        ) from error


def to_yaml(config: Config) -> str:
    """The resolved configuration, every default filled in; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, as they are there.

    Raises:
        ConfigError: the file is missing or broken.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"configuration file {path} does not exist{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration file {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {path} must hold sections (run:, policy:, …), not {tree!r}")
    return tree


ABSENT: Any = object()
"""In place of a value, where a tree does not have the key."""


class Difference(NamedTuple):
    """A key that has another value in another configuration."""

    key: str
    """As the user writes it: `reward.0.weight`."""
    one: Any
    other: Any


def differences(one: Any, other: Any, key: str = "") -> list[Difference]:
    """Where two configuration trees differ; a list of another length is one difference."""
    pairs = _pairs(one, other)
    if pairs is None:
        return [] if one == other else [Difference(key, one, other)]
    return [each for part, a, b in pairs for each in differences(a, b, f"{key}.{part}" if key else part)]


def _pairs(one: Any, other: Any) -> list[tuple[str, Any, Any]] | None:
    """What two sections, or two lists of as many sections, have under the same key; None: they are values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [(key, one.get(key, ABSENT), other.get(key, ABSENT)) for key in {**one, **other}]
    if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other)):
        return None
    if not all(isinstance(entry, dict) for entry in [*one, *other]):
        return None
    return [(str(place), a, b) for place, (a, b) in enumerate(zip(one, other, strict=True))]


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"{override!r} is not an override; write section.key=value, as in rollout.num_workers=2"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from error
    *parents, last = key.split(".")
    place: Any = tree
    for depth, part in enumerate(parents):
        child = _child(place, part)
        if child is None:
            child = {}
            _set_child(place, part, child, override)
        if not isinstance(child, dict | list):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section"
            )
        place = child
    _set_child(place, last, value, override)


def _child(place: Any, part: str) -> Any:
    if isinstance(place, list):
        return place[int(part)] if part.isdigit() and int(part) < len(place) else None
    return place.get(part)


def _set_child(place: Any, part: str, value: Any, override: str) -> None:
    if isinstance(place, dict):
        place[part] = value
    elif part.isdigit() and int(part) < len(place):
        place[int(part)] = value
    else:
        raise ConfigError(f"override {override!r}: the list has {len(place)} entries, there is no {part!r}")


def _algorithm_sections(tree: dict[str, Any]) -> list[type[AlgorithmSettings]]:
    """The settings of the algorithm that a tree names, of all of them where it names none there is."""
    section = tree.get("algorithm")
    name = section.get("name", "ppo") if isinstance(section, dict) else "ppo"
    names = algorithms.algorithm_names()
    return [algorithms.settings_class(each) for each in ([name] if name in names else names)]
