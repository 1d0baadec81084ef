"""Configuration sections of the three worker roles. Importing this loads no engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.settings import Section

DTypeName = Literal["float32", "bfloat16", "float16"]

Batching = Literal["auto", "packed", "padded"]
"""How sequences share a forward pass. `packed`: in one row without padding, which the model's attention must
support; `padded`: sorted by length, with at most 5 % padding; `auto`: packed where that is found to compute
the same."""


class WorkerSettings(Section):
    """What every role has: how many workers, and what each reserves."""

    num_workers: int = Field(default=1, ge=1, le=4096)
    """Ray actors of this role."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that each worker reserves in Ray. None: an equal share of one node's cores, counting every
    role, because in synchronous training the roles take turns."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Compute threads of each worker. None: the node's cores divided by this role's workers, at least 1."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that each worker reserves. 0 runs the role on CPU."""


class SamplingSettings(Section):
    """How responses are sampled."""

    temperature: float = Field(default=1.0, ge=0, le=10)
    """Softmax temperature at the first step. 0 is greedy, and then there is nothing to learn from."""
    temperature_final: float | None = Field(default=None, gt=0, le=10)
    """Temperature at the last step, reached linearly. None: constant. Higher explores more."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling. Below 1 the sampled distribution is no longer the one that is trained."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all. The caution of `top_p` applies."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest response, in tokens."""
    min_tokens: int = Field(default=0, ge=0)
    """Shortest response: end-of-sequence is masked before. Equal to `max_tokens` it forces the length. The
    learner masks nothing: above 0, the caution of `top_p` applies to the first so many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's own end-of-sequence tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> SamplingSettings:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self

    def temperature_at(self, step: int, num_steps: int) -> float:
        """Linear from `temperature` at step 0 to `temperature_final` at the last step."""
        if self.temperature_final is None or num_steps <= 1:
            return self.temperature
        share = step / (num_steps - 1)
        return self.temperature + share * (self.temperature_final - self.temperature)


class RolloutSettings(WorkerSettings):
    """Rollout workers: one vLLM engine each."""

    num_workers: int = Field(default=2, ge=1, le=4096)
    """vLLM engines."""
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompt ordinals that one learner step is trained on."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt."""
    sampling: SamplingSettings = SamplingSettings()
    """How responses are sampled."""
    on_update: Literal["continue", "finish", "restart"] = "continue"
    """What becomes of requests under way when new weights come: they go on with them, and their tokens say
    which version drew them; they are finished first; or they start again. Synchronous training has none."""
    dtype: DTypeName | None = None
    """Weights and activations. None: float32 on CPU, bfloat16 on GPU."""
    context_tokens: int | None = Field(default=None, ge=8)
    """Prompt and response together, at most. None: the policy's own limit."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Sequences that an engine decodes at the same time."""
    samples_per_batch: int = Field(default=32, ge=1)
    """Finished samples that a worker sends on to scoring as one batch, while it goes on decoding."""
    cpu_kv_cache_gib: float = Field(default=0.5, gt=0)
    """KV cache of an engine on CPU, in GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine may take."""
    enforce_eager: bool = False
    """Run without CUDA graphs on GPU. CPU engines always do."""


class ScoringSettings(WorkerSettings):
    """Scoring workers: rewards and reference log-probabilities."""

    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Token budget, padding included, of one forward pass of the reference or reward model."""
    batching: Batching = "auto"
    """Whether sequences are `packed` into one row or `padded`. `auto`: packed where the model supports it."""
    dtype: DTypeName | None = None
    """Reference and reward models. None: float32 on CPU, bfloat16 on GPU."""
    max_attempts: int = Field(default=3, ge=1)
    """At a sample whose reward raises, hangs or is not finite, or whose worker is lost over it; then its
    prompt is given up and written to the dead letters."""
    backoff_s: float = Field(default=1, ge=0)
    """Before a sample's second attempt, twice as long before each further one, a minute at most. Where a
    reward asks a service that may be away for a while, this and `max_attempts` say for how long."""


class OptimizerSettings(Section):
    """AdamW with a warm-up and a schedule."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate. 1e-6 suits billions of parameters; millions want 1e-4 to 1e-3."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0 with the last update that is
    planned. Where `algorithm.target_kl` ends steps early, fewer are made, and the course stops short of 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer updates over which the learning rate rises linearly from 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class ValueOptimizerSettings(OptimizerSettings):
    """AdamW of the value model, which starts further from its goal than the policy does."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate; several times the policy's."""


class LoRASettings(Section):
    """Low-rank adapters, trained in place of the policy's weights: W + alpha / rank x B A. None: none."""

    rank: int = Field(default=8, ge=1)
    """Rank of the adapters: rows of A, columns of B."""
    alpha: int = Field(default=16, ge=1)
    """Divided by the rank, how much an adapter's product counts."""
    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Linear layers that get an adapter, by the end of their names, as in `[q_proj, v_proj]`. None: every
    one but the head."""


class LearnerSettings(WorkerSettings):
    """Learner group: one DeepSpeed rank a worker."""

    num_workers: int = Field(default=2, ge=1, le=4096)
    """Ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed partitions over the ranks: 0 nothing, 1 the optimizer state, 2 also gradients, 3 also
    parameters."""
    policy_optimizer: OptimizerSettings = OptimizerSettings()
    """Of the policy."""
    value_optimizer: ValueOptimizerSettings = ValueOptimizerSettings()
    """Of the value model."""
    lora: LoRASettings | None = None
    """Train low-rank adapters of the policy in place of its weights. They want a learning rate some ten times
    higher. None: train the weights. The supervised stage and the value model always train theirs."""
    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Token budget, padding included, of one forward and backward pass on one rank."""
    batching: Batching = "auto"
    """Whether sequences are `packed` into one row or `padded`. `auto`: packed where the model supports it."""
    dtype: DTypeName | None = None
    """Compute dtype; master weights are float32. None: float32 on CPU, bfloat16 on GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
