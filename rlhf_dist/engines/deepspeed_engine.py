"""One model under DeepSpeed ZeRO on one rank: forward, accumulated backward, step, gather, checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import get_scheduler

from rlhf_dist.engines.checkpoint_files import FolderWriter
from rlhf_dist.engines.model_tensors import ModelTensor
from rlhf_dist.engines.settings import LearnerSettings, OptimizerSettings
from rlhf_dist.engines.training_state import load_training_state, save_training_state
from rlhf_dist.weights.snapshot import Bucket

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
    def skips_overflow(self) -> bool:
        """Whether an update whose gradient is not finite is left out, as it is now and then in float16."""
        return bool(self._engine.fp16_enabled())

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._engine.get_lr()[0])

    def gathered(self, tensors: Iterable[ModelTensor]) -> Iterator[Bucket]:
        """Full tensors of the module in buckets, a tied one under all its names.

        A collective under ZeRO-3: every rank must exhaust it. A bucket is valid while the next one is drawn,
        which gathers it, until the one after that is; the last bucket is empty.
        """
        before = ExitStack()
        for bucket in _buckets(tensors):
            gathered = ExitStack()
            parameters = [parameter for tensor in bucket for parameter in tensor.parameters]
            gathered.enter_context(deepspeed.zero.GatheredParameters(parameters))
            yield [(tensor.names, tensor.value()) for tensor in bucket]
            before.close()
            before = gathered
        yield []
        before.close()

    def _clip_plain_gradients(self) -> None:
        self._plain_norm = nn.utils.clip_grad_norm_(
            self._engine.module.parameters(), self._engine.gradient_clipping()
        )

    def save(self, writer: FolderWriter, folder: str) -> None:
        """Write trained parameters, optimizer and schedule into a folder of the writer's. A collective."""
        save_training_state(self._engine, writer, folder)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, with any number of ranks and any ZeRO stage. A collective.

        Raises:
            StorageError: it cannot be read, or is of another model.
        """
        load_training_state(self._engine, folder)


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


def _buckets(tensors: Iterable[ModelTensor]) -> Iterator[list[ModelTensor]]:
    bucket: list[ModelTensor] = []
    num_elements = 0
    for tensor in tensors:
        bucket.append(tensor)
        num_elements += tensor.num_elements
        if num_elements >= GATHER_BUCKET_ELEMENTS:
            yield bucket
            bucket, num_elements = [], 0
    if bucket:
        yield bucket
