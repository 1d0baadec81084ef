"""The trained policy in Hugging Face folders: the whole of it, and its adapters alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf_dist.engines.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.engines.model_tensors import ADAPTER, ModelTensor, model_tensors, trained_tensors
from rlhf_dist.errors import StorageError


def export_causal_lm(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write the causal language model under a policy engine, adapters merged. A collective; rank 0 writes.

    Raises:
        StorageError: on rank 0, after the collective: the folder cannot be written.
    """
    lm = engine.module.lm
    weights = _on_cpu(engine, model_tensors(lm))
    if dist.get_rank() == 0:
        with _writing(folder):
            lm.save_pretrained(folder, state_dict=weights)


def export_adapters(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write the adapters under a policy engine as `peft` reads them. A collective; rank 0 writes.

    Raises:
        StorageError: on rank 0, after the collective: the folder cannot be written.
    """
    from peft import get_peft_model_state_dict

    lm = engine.module.lm
    weights = _on_cpu(engine, trained_tensors(lm))
    if dist.get_rank() == 0:
        # peft would ask the hub whether the embedding has grown, to add it; ours is never trained.
        adapters = get_peft_model_state_dict(lm, weights, ADAPTER, save_embedding_layers=False)
        with _writing(folder):
            lm.peft_config[ADAPTER].save_pretrained(folder)
            save_file(
                {f"base_model.model.{name}": tensor for name, tensor in adapters.items()},
                folder / "adapter_model.safetensors",
                metadata={"format": "pt"},
            )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder} cannot be written ({error})") from error


def _on_cpu(engine: DeepSpeedEngine, tensors: list[ModelTensor]) -> dict[str, torch.Tensor]:
    return {
        names[0]: tensor.to("cpu", copy=True)  # tied ones once, under the name that the model saves them by
        for bucket in engine.gathered(tensors)
        for names, tensor in bucket
    }
