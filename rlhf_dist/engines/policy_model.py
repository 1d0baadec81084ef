"""The policy as the learner and the reference scorer see it: log-probabilities of response tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_dist.engines.loading import load_model, set_mode
from rlhf_dist.engines.lora import add_adapters
from rlhf_dist.engines.packing import choose_packing
from rlhf_dist.engines.settings import Batching, LoRASettings
from rlhf_dist.experience.sequences import SequenceBatch
from rlhf_dist.ops.logprobs import logprobs_and_entropy, logprobs_from_logits


class PolicyModel(nn.Module):
    """A causal language model whose forward pass gives the response tokens' log-probabilities."""

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype,
        batching: Batching = "auto",
        gradient_checkpointing: bool = False,
        lora: LoRASettings | None = None,
        seed: int = 0,
    ) -> None:
        """Load the model; see `set_mode`.

        Args:
            lora: the adapters that are trained; None trains every weight.
            seed: of the adapters.

        Raises:
            ModelError: it cannot be loaded, or not be packed where `batching` insists, or has no such layers
                as are to have adapters.
        """
        super().__init__()
        self.lm = load_model(AutoModelForCausalLM, model, dtype=dtype, role="policy")
        set_mode(self.lm, gradient_checkpointing=gradient_checkpointing)
        self.packs = choose_packing(self.lm, batching, f"policy model {model!r}")
        if lora is not None:
            add_adapters(self.lm, lora, model=model, seed=seed)

    def forward(
        self, batch: SequenceBatch, temperature: float = 1.0, with_entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies, in nats, of the distribution tempered by `temperature`.

        Returns:
            Two [B, T] float32 tensors, zero beyond each response's end; the second None if not asked for.
        """
        logits = self.lm(**batch.inputs(), logits_to_keep=batch.kept).logits  # (R, K, V)
        if not with_entropy:
            return batch.responses(logprobs_from_logits(logits, batch.labels, temperature)), None
        logprobs, entropy = logprobs_and_entropy(logits, batch.labels, temperature)
        return batch.responses(logprobs), batch.responses(entropy)
