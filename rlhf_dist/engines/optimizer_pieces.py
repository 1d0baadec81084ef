"""Where DeepSpeed keeps the float32 master weights and the Adam moments of each parameter on this rank.

    stage 0, float32     AdamW steps on the module's parameters
    stage 0, lower       on a float32 copy of each; whole on every rank
    stages 1 and 2       on this rank's part of one flat float32 tensor of all parameters
    stage 3              on this rank's parts of all parameters, one after the other in flat float32 tensors

AdamW has its moments beside the tensor that it steps on, in the same order. So a piece of a parameter is a
range of such a tensor, and the same range of its moments. No other module knows how DeepSpeed lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MASTER = "parameters"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """This rank's part of a trained parameter. It may be empty."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Its first element, in the flattened parameter."""
    length: int
    stepped: torch.Tensor
    """The float32 tensor that AdamW steps on and that the piece is in."""
    offset: int
    """Its first element there."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece [length] of the stepped tensor, or of one like it."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def trained_pieces(engine: Any) -> list[Piece]:
    """The pieces of every trained parameter in the module's order; names and shapes are every rank's."""
    parameters = [(name, each) for name, each in engine.module.named_parameters() if each.requires_grad]
    by_parameter = dict(_placed(engine))
    pieces = []
    for name, parameter in parameters:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        pieces.append(Piece(name, shape, *by_parameter[parameter]))
    return pieces


def adamw_of(engine: Any) -> torch.optim.Optimizer:
    """The optimizer itself, under whatever DeepSpeed wraps it in."""
    return engine.basic_optimizer


def is_partitioned(engine: Any) -> bool:
    """Whether each element is on one rank only; else all are on every rank."""
    return bool(engine.zero_optimization_stage() > 0)


@torch.no_grad()
def refresh_parameters(engine: Any) -> None:
    """Derive the module's parameters from the master weights. A collective under ZeRO."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        flat = zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        )
        for low, master in flat:
            low.data.copy_(master.data)
        if optimizer.persistent_parameters:  # small ones that stay gathered
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
    elif not _steps_on_parameters(engine):
        for low, master in _copies(optimizer):
            low.data.copy_(master.data)


def loss_scaler(engine: Any) -> Any | None:
    """What holds the scale of float16's loss; None in another dtype."""
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or optimizer.loss_scale_config


def _placed(engine: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int, torch.Tensor, int]]]:
    """Each parameter with its piece's start, length, stepped tensor and offset."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            for parameter in group:
                _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = min(dist.get_rank() * size, parameter.ds_numel)  # the last parts are padded
                yield parameter, (start, min(size, parameter.ds_numel - start), flat, offset)
    elif stage > 0:
        for group, flat in zip(
            optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
        ):
            for parameter in group:
                place = parameter._hp_mapping
                if place is None:
                    yield parameter, (0, 0, flat, 0)
                else:
                    part, there = place.lp_fragment_address, place.hp_fragment_address
                    yield parameter, (part.start, part.numel, flat, there.start)
    else:
        copies = (
            ((each, each) for group in optimizer.param_groups for each in group["params"])
            if _steps_on_parameters(engine)
            else _copies(optimizer)
        )
        for parameter, master in copies:
            yield parameter, (0, parameter.numel(), master, 0)


def _steps_on_parameters(engine: Any) -> bool:
    return engine.optimizer is engine.basic_optimizer


def _copies(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(lows, masters, strict=True)
