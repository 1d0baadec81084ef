"""The policy as the learner and the reference scorer see it: log-probabilities of response tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_dist.engines.loading import load_model, set_mode
from rlhf_dist.ops.logprobs import logprobs_and_entropy, logprobs_from_logits, next_tokens


class PolicyModel(nn.Module):
    """A causal language model whose forward pass gives the response tokens' log-probabilities."""

    def __init__(self, model: str, *, dtype: torch.dtype, gradient_checkpointing: bool = False) -> None:
        """Load the model; see `set_mode`."""
        super().__init__()
        self.lm = load_model(AutoModelForCausalLM, model, dtype=dtype, role="policy")
        set_mode(self.lm, gradient_checkpointing=gradient_checkpointing)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        response_start: torch.Tensor,
        response_length: torch.Tensor,
        temperature: float = 1.0,
        with_entropy: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies, in nats, of the distribution tempered by `temperature`.

        Args: see `experience.samples.SequenceBatch`; [B, S] and [B].

        Returns:
            Two [B, T] float32 tensors, zero beyond each response's end; the second None if not asked for.
        """
        first = int(response_start.min()) - 1
        positions = torch.arange(first, max(first + 1, input_ids.shape[1] - 1), device=input_ids.device)
        logits = self.lm(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions
        ).logits  # (B, K, V): position p predicts token p + 1
        labels = next_tokens(input_ids)[:, positions]
        start = response_start - 1 - first
        if not with_entropy:
            logprobs = logprobs_from_logits(logits, labels, temperature)
            return align_responses(logprobs, start, response_length), None
        logprobs, entropy = logprobs_and_entropy(logits, labels, temperature)
        return (
            align_responses(logprobs, start, response_length),
            align_responses(entropy, start, response_length),
        )


def align_responses(per_position: torch.Tensor, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Shift each row of [B, K] so that its response begins in column 0; [B, T], zero beyond its length.

    Args:
        start: [B] column of the first response token's value.
        length: [B] response tokens; T is the largest.
    """
    steps = torch.arange(int(length.max()), device=per_position.device)  # (T,)
    columns = (start[:, None] + steps).clamp(max=per_position.shape[1] - 1)  # (B, T)
    return per_position.gather(1, columns).masked_fill(steps >= length[:, None], 0.0)
