"""A packed pass computes what plain passes compute; where it would not, the model keeps its own attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from rlhf_dist.engines.packing import IMPLEMENTATION, choose_packing, pack_attention, packed_inputs
from rlhf_dist.errors import ModelError

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PACKABLE = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "qwen2, tied": Qwen2Config(**SMALL, **HEADS, tie_word_embeddings=True),
    "mistral, sliding window": MistralConfig(**SMALL, **HEADS, sliding_window=4),
    "gpt2, learned positions": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),
}
LENGTHS = (7, 7, 5, 3, 3, 3, 1)


def models(config):
    """The same weights twice, the second to be packed."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    return plain, copy.deepcopy(plain)


@pytest.mark.parametrize("config", PACKABLE.values(), ids=PACKABLE)
def test_a_pack_gives_the_logits_and_gradients_of_each_sequence_alone(config):
    plain, packed = models(config)
    assert pack_attention(packed)
    sequences = [torch.randint(0, 50, (length,)) for length in LENGTHS]
    weights = [torch.randn(length, 50) for length in LENGTHS]
    alone = [plain(input_ids=each[None], use_cache=False).logits[0] for each in sequences]
    together = packed(**packed_inputs(sequences), use_cache=False).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    sum((logits * weight).sum() for logits, weight in zip(alone, weights, strict=True)).backward()
    (together * torch.cat(weights)).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_sliding_window_is_one_within_the_sequence():
    plain, packed = models(PACKABLE["mistral, sliding window"])
    full = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, **HEADS, sliding_window=None)).eval()
    full.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 50, (12,))
    assert pack_attention(packed)
    windowed = packed(**packed_inputs([tokens])).logits
    torch.testing.assert_close(windowed, plain(input_ids=tokens[None]).logits, rtol=1e-4, atol=1e-5)
    assert (windowed - full(input_ids=tokens[None]).logits).abs().max() > 1e-3


def test_a_model_that_carries_a_state_along_the_row_keeps_its_own_way():
    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)
    plain, trial = models(config)
    before = trial.config._attn_implementation
    assert not pack_attention(trial)
    assert trial.config._attn_implementation == before
    tokens = torch.randint(0, 50, (1, 6))
    assert torch.equal(trial(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    with pytest.raises(
        ModelError, match="policy model 'm' does not compute the same when its sequences are packed"
    ):
        choose_packing(trial, "packed", "policy model 'm'")


def test_padded_leaves_the_attention_alone():
    plain, _ = models(PACKABLE["llama"])
    assert not choose_packing(plain, "padded", "policy")
    assert plain.config._attn_implementation != IMPLEMENTATION
