"""Untrained small models in ordinary Hugging Face form, for the built-in tasks and for tests.

What is written loads by path with `AutoModelForCausalLM`, `AutoTokenizer` and vLLM: `config.json`,
`model.safetensors`, `tokenizer.json`, `tokenizer_config.json` with a ChatML template, and
`generation_config.json`. The same arguments write the same weights and the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)

PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"

HEAD_DIM = 32
"""The smallest head that vLLM's CPU attention supports."""

WIDE, WIDE_HEAD_DIM = 1024, 128
"""From this width on heads are as wide as those of models that people use."""

INITIALIZER_RANGE, WIDE_INITIALIZER_RANGE = 0.06, 0.02
"""Qwen2's own suits wide models; with it a narrow one is slow to learn to copy from its prompt."""

CHAT_ROLES = ("system", "user", "assistant") * 2
"""Part of every corpus, twice, so that a role is one token."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_causal_lm(
    folder: Path,
    corpus: Iterable[str],
    *,
    seed: int,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    num_layers: int = 2,
    max_positions: int = 256,
) -> None:
    """Write an untrained Qwen2 language model and a tokenizer trained on `corpus`.

    `vocab_size` is an upper limit; the embedding has a row for each token there is, and no more.
    """
    save_causal_lm(
        folder,
        train_tokenizer(corpus, vocab_size=vocab_size, max_positions=max_positions),
        seed=seed,
        hidden_size=hidden_size,
        num_layers=num_layers,
    )


def save_causal_lm(
    folder: Path, tokenizer: Qwen2Tokenizer, *, seed: int, hidden_size: int, num_layers: int
) -> None:
    """Write an untrained Qwen2 language model for a tokenizer of `train_tokenizer`, and that beside it."""
    config = _config(tokenizer, hidden_size, num_layers, tokenizer.model_max_length)
    model = _initialised(Qwen2ForCausalLM, config, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=True, temperature=1.0
    )
    _save(model, folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def save_tiny_reward_model(
    folder: Path,
    corpus: Iterable[str],
    *,
    seed: int,
    vocab_size: int = 1024,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_positions: int = 256,
) -> None:
    """Write an untrained Qwen2 that gives a sequence one score, and a tokenizer trained on `corpus`."""
    tokenizer = train_tokenizer(corpus, vocab_size=vocab_size, max_positions=max_positions)
    config = _config(tokenizer, hidden_size, num_layers, max_positions)
    config.num_labels = 1
    model = _initialised(Qwen2ForSequenceClassification, config, seed)
    _save(model, folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def head_dim(hidden_size: int) -> int:
    """Width of an attention head in a model of the given width."""
    return WIDE_HEAD_DIM if hidden_size >= WIDE else HEAD_DIM


def train_tokenizer(corpus: Iterable[str], *, vocab_size: int, max_positions: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, with a token for each frequent word.

    It splits text as Qwen2's own tokenizer does, which is what `AutoTokenizer` makes of it when it loads.
    """
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*CHAT_ROLES, *corpus], trainer)
    trained = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens=[START_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
    )


def _config(tokenizer: Qwen2Tokenizer, hidden_size: int, num_layers: int, max_positions: int) -> Qwen2Config:
    """A Qwen2 of the given size with tied embeddings."""
    num_heads = hidden_size // head_dim(hidden_size)
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        initializer_range=WIDE_INITIALIZER_RANGE if hidden_size >= WIDE else INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _initialised(model_class: type[PreTrainedModel], config: Qwen2Config, seed: int) -> PreTrainedModel:
    """The model with weights drawn from `seed`, leaving the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).float()


def _save(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes, which would import DeepSpeed to see whether it wraps the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"})
