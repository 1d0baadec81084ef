"""One model under DeepSpeed ZeRO on one rank: forward, accumulated backward, step, gather, checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import get_scheduler

from rlhf_dist.engines.settings import LearnerSettings, OptimizerSettings

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
GATHER_BUCKET_ELEMENTS = 64 * 1024 * 1024
"""Parameters that are gathered at the same time under ZeRO-3: 256 MiB in float32."""


class DeepSpeedEngine:
    """A module, its optimizer and its schedule. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        module: nn.Module,
        settings: LearnerSettings,
        optimizer: OptimizerSettings,
        *,
        num_updates: int,
        dtype: torch.dtype,
    ) -> None:
        """Wrap the module; the process group must exist.

        Args:
            num_updates: optimizer updates of the whole run, for the schedule.
            dtype: compute dtype; optimizer state and master weights are float32.
        """
        self._zero_stage = settings.zero_stage
        self._engine, _, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            lr_scheduler=lambda made: get_scheduler(
                _SCHEDULES[optimizer.schedule],
                made,
                num_warmup_steps=optimizer.warmup_steps,
                num_training_steps=num_updates,
            ),
            config=_deepspeed_config(settings, optimizer, dtype),
            dist_init_required=False,
        )

        self._plain_norm: torch.Tensor | None = None
        if settings.zero_stage == 0 and dtype == torch.float32:
            # Plain data parallelism: DeepSpeed clips, but does not tell the norm.
            self._engine.clip_fp32_gradients = self._clip_plain_gradients

    @property
    def module(self) -> Any:
        """The wrapped module."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. DeepSpeed averages over ranks: scale a sum over ranks by their number."""
        self._engine.backward(loss)

    def step(self) -> float:
        """Apply what was accumulated; returns the gradient's global norm before clipping."""
        self._engine.step()
        norm = self._plain_norm if self._plain_norm is not None else self._engine.get_global_grad_norm()
        return float(norm)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._engine.get_lr()[0])

    def gathered(self, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Full parameters of a submodule by name, tied ones under each of their names.

        A collective under ZeRO-3: every rank must exhaust it. A tensor is valid until the next one is drawn.
        """
        if self._zero_stage < 3:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                yield name, parameter.detach()
            return
        for bucket in _buckets(module):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                for name, parameter in bucket:
                    yield name, parameter.detach()

    def _clip_plain_gradients(self) -> None:
        self._plain_norm = nn.utils.clip_grad_norm_(
            self._engine.module.parameters(), self._engine.gradient_clipping()
        )

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's share of the parameters, optimizer and schedule. A collective."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read back what `save` wrote with the same number of ranks and ZeRO stage. A collective."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise FileNotFoundError(f"no DeepSpeed checkpoint {tag!r} under {folder}")


def _deepspeed_config(
    settings: LearnerSettings, optimizer: OptimizerSettings, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # backward() accumulates, step() reduces and applies: micro-batches need no fixed number.
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
            },
        },
    }


def _buckets(module: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    bucket: list[tuple[str, nn.Parameter]] = []
    num_elements = 0
    for name, parameter in module.named_parameters(remove_duplicate=False):
        bucket.append((name, parameter))
        num_elements += parameter.ds_numel
        if num_elements >= GATHER_BUCKET_ELEMENTS:
            yield bucket
            bucket, num_elements = [], 0
    if bucket:
        yield bucket
