"""What a run's configuration says about its prompts and demonstrations; the loaders here read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.settings import Section


class SourceSettings(Section):
    """How rows are picked and rendered, whichever source they come from."""

    split: str = "train"
    """Split of a `datasets` source or of a `task:` source; a single file has no splits and is read whole."""

    config_name: str | None = None
    """Configuration of a `datasets` source, for example `main` of `openai/gsm8k`; None: its default one."""

    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of `{role, content}` chat messages."""

    system_prompt: str | None = None
    """Put before each prompt as the system message, unless the row's messages bring their own."""

    chat_template: Literal["auto", "always", "never"] = "auto"
    """auto: the tokenizer's chat template when it has one; always: an error when it has none; never:
    plain text."""

    over_limit: Literal["error", "skip"] = "error"
    """A row with more tokens than the limit: stop with an error that names it (the default, since
    leaving rows out changes what is trained on), or leave it out and count it."""

    shuffle: bool = True
    """A new order each epoch, from the run's seed alone; False: the order of the source."""

    limit: int | None = Field(default=None, gt=0)
    """Only the first so many rows of the source; None: all."""


class DataSettings(SourceSettings):
    """Where prompts come from."""

    prompts: str = Field(min_length=1)
    """A path (.jsonl, .json, each also .gz, or .parquet), `task:NAME` for a task of this project, or a
    `datasets` name or saved folder."""

    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of a rendered prompt; None: the model's context less the response's limit."""

    max_response_tokens_column: str | None = None
    """Column with the most tokens of a response to the row's prompt, for rows that want fewer than
    `rollout.sampling.max_tokens`. With `min_tokens` equal to that, every response is exactly as long as its
    row says. None: one limit for all."""


class SFTSettings(SourceSettings):
    """Supervised fine-tuning on demonstrations."""

    demonstrations: str = Field(min_length=1)
    """Rows of a prompt and its response, from the same kinds of sources as `data.prompts`."""

    response_column: str = "response"
    """Column with the response, a string."""

    num_steps: int = Field(default=100, gt=0)
    """Optimizer steps; demonstrations are passed over again when they run out."""

    batch_size: int = Field(default=32, gt=0)
    """Demonstrations in an optimizer step, over all ranks."""

    max_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of a prompt and its response together; None: the model's context."""

    max_tokens_per_micro_batch: int = Field(default=8192, gt=0)
    """Padded tokens in one forward and backward pass of a rank: what bounds its activation memory."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate; the default suits full fine-tuning of a pretrained model."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from 0 to its peak."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> SFTSettings:
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than num_steps={self.num_steps}")
        return self
