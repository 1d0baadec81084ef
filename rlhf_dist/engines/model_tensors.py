"""A model's tensors under its plain Hugging Face names, with what adapters add merged into them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
"""peft's name of the one adapter that a layer has."""


@dataclass(frozen=True)
class ModelTensor:
    """A full tensor, and the parameters that it is computed from."""

    names: tuple[str, ...]
    """Its own, several where it is tied."""
    weight: nn.Parameter
    """What it is, or what an adapter adds to."""
    layer: LoraLayer | None = None
    """Whose adapter adds to it."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What must be gathered before `value`."""
        if self.layer is None:
            return [self.weight]
        return [self.weight, self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight]

    @property
    def num_elements(self) -> int:
        """Of the full tensor, where this rank holds only its share, too."""
        return int(getattr(self.weight, "ds_numel", self.weight.numel()))

    @property
    def num_bytes(self) -> int:
        """Of the full tensor."""
        return self.num_elements * self.weight.element_size()

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        """The tensor; with an adapter a new one, W + alpha / rank x B A in float32, cast to W's dtype."""
        if self.layer is None:
            return self.weight.detach()
        weight, a, b = (each.float() for each in self.parameters)  # [out, in], [rank, in], [out, rank]
        change = self.layer.scaling[ADAPTER] * (b @ a)
        return (weight + (change.T if self.layer.fan_in_fan_out else change)).to(self.weight.dtype)


def model_tensors(model: nn.Module) -> list[ModelTensor]:
    """Every tensor of a model as it would be without adapters, a tied one once."""
    layers = _layers_with_adapters(model)
    by_weight = {layer.get_base_layer().weight: layer for _, layer in layers}
    inside = tuple(f"{name}.lora_" for name, _ in layers)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            names.setdefault(parameter, []).append(name.replace(".base_layer.", "."))
    return [ModelTensor(tuple(each), weight, by_weight.get(weight)) for weight, each in names.items()]


def trained_tensors(model: nn.Module) -> list[ModelTensor]:
    """Every trained parameter of a model by the name it has there, adapters by themselves."""
    return [ModelTensor((name,), each) for name, each in model.named_parameters() if each.requires_grad]


def _layers_with_adapters(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    if "peft" not in sys.modules:  # which puts them there
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer)]
