"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from rlhf_dist.engines.deepspeed_engine import DeepSpeedEngine


def export_causal_lm(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write the causal language model under a policy engine. A collective; rank 0 writes."""
    lm = engine.module.lm
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in engine.gathered(lm)}
    if dist.get_rank() == 0:
        # Tied weights go in once, under the name that the model itself saves them by.
        lm.save_pretrained(folder, state_dict={name: weights[name] for name, _ in lm.named_parameters()})
