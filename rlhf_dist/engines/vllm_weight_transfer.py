"""Snapshots through vLLM's own weight-transfer interface.

Registered in vLLM under `BACKEND`; the engine calls `start_weight_update`, `update_weights` and
`finish_weight_update` on it inside every vLLM worker process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_dist.types import WeightManifest, WeightPayload
from rlhf_dist.weights.snapshot import named_tensors

BACKEND = "rlhf_dist_snapshot"


@dataclass
class SnapshotInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the manifest of each update says all."""


@dataclass
class SnapshotUpdateInfo(WeightTransferUpdateInfo):
    """One whole snapshot."""

    manifest: WeightManifest
    payload: WeightPayload


class SnapshotTransferEngine(WeightTransferEngine[SnapshotInitInfo, SnapshotUpdateInfo]):
    """Loads a verified snapshot into the model with vLLM's layerwise reload."""

    init_info_cls = SnapshotInitInfo
    update_info_cls = SnapshotUpdateInfo

    def init_transfer_engine(self, init_info: SnapshotInitInfo) -> None:
        """No rendezvous: snapshots come with the update call."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SnapshotUpdateInfo) -> None:
        tensors = named_tensors(update_info.manifest, update_info.payload)
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in tensors)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Holds nothing between updates."""


def register() -> None:
    """Make the backend known to vLLM in this process; also vLLM's plug-in entry point."""
    registry: dict[str, Callable[..., Any]] = WeightTransferEngineFactory._registry
    if BACKEND not in registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SnapshotTransferEngine)
