"""Low-rank adapters (LoRA, Hu et al. 2022): W + alpha / rank x B A, of which only A and B are trained.

peft puts them into the model in place: a linear layer becomes one that adds the adapter's product to its own.
B starts at zero, so the policy starts as the checkpoint that it was loaded from. Importing peft takes a
second of a process's start, so it is imported where there are adapters, and nowhere else.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_dist.engines.loading import load_skeleton
from rlhf_dist.engines.model_tensors import ADAPTER
from rlhf_dist.engines.settings import LoRASettings
from rlhf_dist.errors import ModelError


def add_adapters(lm: Any, settings: LoRASettings, *, model: str, seed: int) -> None:
    """Put adapters into a causal language model in place, and freeze everything else.

    Args:
        model: the checkpoint that it is, for the adapter's configuration and for errors.
        seed: decides A, whatever the random state is.

    Raises:
        ModelError: see `check_targets`.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    _check_targets(lm, settings, model)
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules="all-linear" if targets is None else list(targets),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model,
        fan_in_fan_out=any(isinstance(each, Conv1D) for each in lm.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm, adapter_name=ADAPTER)


def check_targets(model: str, settings: LoRASettings, *, name: str | None = None) -> None:
    """Make sure that every target module is in a checkpoint's model, without loading weights.

    Args:
        name: what the user calls the checkpoint. None: as it is given.

    Raises:
        ModelError: one names no linear layer that can have an adapter.
    """
    _check_targets(load_skeleton(model, role="policy"), settings, name or model)


def _check_targets(lm: Any, settings: LoRASettings, model: str) -> None:
    linear = _linear_layers(lm)
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in settings.target_modules or ():
        matched = {name for name, _ in lm.named_modules() if f".{name}".endswith(f".{target}")}
        if not matched or not matched <= linear:
            near = difflib.get_close_matches(target, known, n=1)
            raise ModelError(
                f"learner.lora.target_modules: {target!r} names no linear layer of policy model {model!r} "
                f"with a weight of its own{f'; did you mean {near[0]!r}?' if near else ''}; "
                f"there are: {', '.join(known)}"
            )


def _linear_layers(lm: Any) -> set[str]:
    """Names of the layers that can have an adapter: a head that is tied to the embedding cannot."""
    embedding = lm.get_input_embeddings().weight
    return {
        name
        for name, each in lm.named_modules()
        if isinstance(each, nn.Linear | Conv1D) and each.weight is not embedding
    }
