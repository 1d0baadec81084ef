"""Configuration of rewards: a list of parts whose weighted sum is the reward of a sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_dist.settings import Section


class FunctionRewardSettings(Section):
    """A Python function."""

    kind: Literal["function"] = "function"
    """Discriminator."""
    path: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:function`; called as `function(prompts, responses, columns)` with two lists of
    strings and the data set's columns as a dict of lists, one entry a sample; returns one number a sample."""
    timeout_s: float | None = Field(default=300, gt=0)
    """Seconds that one call, on a batch of samples, may take; after that the worker is replaced. Calls run in
    a thread of their own for it, where Python sets no signal handlers. None: no limit, and no such thread."""
    weight: float = 1.0
    """Factor in the sum."""
    name: str | None = None
    """Name in the metrics. None: the function's."""

    @property
    def label(self) -> str:
        """Name of this part in the metrics."""
        return self.name or self.path.split(":")[1]


class ModelRewardSettings(Section):
    """A sequence-classification checkpoint with one label."""

    kind: Literal["model"]
    """Discriminator."""
    model: str
    """Folder or hub name. Its tokenizer may differ from the policy's; text is then tokenized again."""
    weight: float = 1.0
    """Factor in the sum."""
    name: str = "model"
    """Name in the metrics."""

    @property
    def label(self) -> str:
        """Name of this part in the metrics."""
        return self.name


RewardSettings = Annotated[FunctionRewardSettings | ModelRewardSettings, Field(discriminator="kind")]
