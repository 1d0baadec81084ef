"""A model's training state in files that any number of ranks and any ZeRO stage can go on from.

    parameters.safetensors    trained parameters, float32, whole, by name
    exp_avg.safetensors       their Adam moments, where the optimizer has made a step
    exp_avg_sq.safetensors
    progress.json             how many steps the optimizer, the schedule and the loss scale have seen

What is on several ranks is summed into rank 0, bucket by bucket: every element is on one rank, and the others
add the integer 0 to its bits, which leaves them as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_dist.engines.checkpoint_files import FolderWriter, TensorFile
from rlhf_dist.engines.optimizer_pieces import (
    MASTER,
    MOMENTS,
    Piece,
    adamw_of,
    is_partitioned,
    loss_scaler,
    refresh_parameters,
    trained_pieces,
)
from rlhf_dist.errors import StorageError

BUCKET_ELEMENTS = 64 * 1024 * 1024
"""Gathered, or read, at the same time: 256 MiB."""
PROGRESS_FILE = "progress.json"
LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler; the last is unknown to that of stage 0."""


def save_training_state(engine: Any, writer: FolderWriter, folder: str) -> None:
    """Write the state of a DeepSpeed engine. A collective; rank 0's writer writes.

    Args:
        folder: its name in the writer's folder.
    """
    pieces = trained_pieces(engine)
    adamw = adamw_of(engine)
    steps = {piece.name: _num_steps(adamw, piece) for piece in pieces}
    shapes = {piece.name: piece.shape for piece in pieces}
    for kind in (MASTER, *MOMENTS) if any(steps.values()) else (MASTER,):
        flat = _gathered(engine, pieces, kind)
        writer.write_tensors(f"{folder}/{kind}.safetensors", shapes, flat)
    progress = {
        "schedule_updates": engine.lr_scheduler.last_epoch,
        "optimizer_steps": steps,
        "loss_scale": _loss_scale(engine),
    }
    writer.write_json(f"{folder}/{PROGRESS_FILE}", progress)


def load_training_state(engine: Any, folder: Path) -> None:
    """Bring an engine to what `save_training_state` wrote. A collective.

    The learning rate and the optimizer's other settings stay the engine's own.

    Raises:
        StorageError: on every rank, where one of them cannot read it, or it is of another model.
    """
    error: Exception | None = None
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        _read_pieces(engine, folder, progress["optimizer_steps"])
        _restore_schedule(engine, progress["schedule_updates"])
        _restore_loss_scale(engine, progress["loss_scale"])
    except (OSError, ValueError, KeyError) as failure:
        error = failure
    failed = torch.tensor([float(error is not None)], device=engine.device)
    dist.all_reduce(failed)
    if error is not None:
        raise StorageError(f"{folder} cannot be loaded: {error}") from error
    if failed.item():
        raise StorageError(f"{folder} cannot be loaded by another rank")
    refresh_parameters(engine)


# ------------------------------------------------------------------------------------------------- saving


def _gathered(engine: Any, pieces: list[Piece], kind: str) -> Iterator[torch.Tensor]:
    """The elements of all tensors of a kind in buckets, whole on rank 0's CPU; the others get empty ones."""
    ends, is_first = _ends(pieces), dist.get_rank() == 0
    if not (is_first or is_partitioned(engine)):
        return
    for begin in range(0, ends[-1] if ends else 0, BUCKET_ELEMENTS):
        end = min(begin + BUCKET_ELEMENTS, ends[-1])
        bucket = torch.zeros(end - begin, dtype=torch.float32, device=engine.device)
        for piece, piece_end in zip(pieces, ends, strict=True):
            first = piece_end - math.prod(piece.shape) + piece.start
            low, high = max(begin, first), min(end, first + piece.length)
            if low < high and (held := _tensor_of(engine, piece, kind)) is not None:
                bucket[low - begin : high - begin] = held[low - first : high - first]
        if is_partitioned(engine):
            dist.reduce(bucket.view(torch.int32), dst=0)
        yield bucket.cpu() if is_first else torch.empty(0)


def _ends(pieces: list[Piece]) -> list[int]:
    """Where each parameter ends, all of them flattened one after the other."""
    ends, end = [], 0
    for piece in pieces:
        end += math.prod(piece.shape)
        ends.append(end)
    return ends


def _tensor_of(engine: Any, piece: Piece, kind: str) -> torch.Tensor | None:
    """The piece [length] of the weights or of a moment; None where there was no step."""
    if kind == MASTER:
        return piece.view(piece.stepped)
    moment = adamw_of(engine).state.get(piece.stepped, {}).get(kind)
    return None if moment is None else piece.view(moment)


def _num_steps(adamw: torch.optim.Optimizer, piece: Piece) -> int:
    return int(adamw.state.get(piece.stepped, {}).get("step", 0))


def _loss_scale(engine: Any) -> dict[str, Any] | None:
    scaler = loss_scaler(engine)
    if scaler is None:
        return None
    return {key: getattr(scaler, key) for key in LOSS_SCALE_KEYS if hasattr(scaler, key)}


# ------------------------------------------------------------------------------------------------ loading


@torch.no_grad()
def _read_pieces(engine: Any, folder: Path, steps: dict[str, int]) -> None:
    """Raises ValueError where the files are of another model."""
    pieces = trained_pieces(engine)
    masters = TensorFile(folder / f"{MASTER}.safetensors")
    if (theirs := masters.shapes) != (ours := {piece.name: piece.shape for piece in pieces}):
        differing = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
        raise ValueError(
            f"it is of another model: {differing[0]} has shape {theirs.get(differing[0])} there, and "
            f"{ours.get(differing[0])} here"
        )
    _prepare_moments(adamw_of(engine), pieces, steps)
    for kind in (MASTER, *MOMENTS) if any(steps.values()) else (MASTER,):
        file = masters if kind == MASTER else TensorFile(folder / f"{kind}.safetensors")
        for piece in pieces:
            if (target := _tensor_of(engine, piece, kind)) is not None:
                _read_piece(file, piece, into=target)


def _read_piece(file: TensorFile, piece: Piece, *, into: torch.Tensor) -> None:
    for begin in range(0, piece.length, BUCKET_ELEMENTS):
        end = min(begin + BUCKET_ELEMENTS, piece.length)
        into[begin:end] = file.read(piece.name, piece.start + begin, end - begin)


def _prepare_moments(adamw: torch.optim.Optimizer, pieces: list[Piece], steps: dict[str, int]) -> None:
    """Moments of 0 beside each stepped tensor, after as many steps as the furthest parameter in it made."""
    furthest: dict[torch.Tensor, int] = {}
    for piece in pieces:
        furthest[piece.stepped] = max(furthest.get(piece.stepped, 0), steps[piece.name])
    for stepped, num_steps in furthest.items():
        if num_steps == 0:
            adamw.state.pop(stepped, None)
        else:
            moments = {kind: torch.zeros_like(stepped) for kind in MOMENTS}
            adamw.state[stepped] = {"step": torch.tensor(float(num_steps))} | moments


def _restore_schedule(engine: Any, num_updates: int) -> None:
    """The schedule's place; what the learning rate is there follows from the engine's own settings."""
    schedule = engine.lr_scheduler
    schedule.last_epoch, schedule._step_count = num_updates, num_updates + 1
    factors = [factor(num_updates) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(adamw_of(engine).param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def _restore_loss_scale(engine: Any, saved: dict[str, Any] | None) -> None:
    scaler = loss_scaler(engine)
    if scaler is None or saved is None:
        return
    for key in saved:
        if hasattr(scaler, key):
            setattr(scaler, key, saved[key])
