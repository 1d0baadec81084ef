"""Loading Hugging Face checkpoints and tokenizers, with errors that name the role and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.errors import ModelError


def torch_dtype(name: str | None, *, on_gpu: bool) -> torch.dtype:
    """The dtype of a role: as configured, else float32 on CPU and bfloat16 on GPU."""
    return getattr(torch, name or ("bfloat16" if on_gpu else "float32"))


def load_model(auto_class: Any, model: str, *, dtype: torch.dtype, role: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained`, from a folder or by hub name.

    Raises:
        ModelError: the folder or name cannot be loaded.
    """
    with _loading(f"{role} model", model):
        return auto_class.from_pretrained(model, dtype=dtype, **kwargs)


def load_skeleton(model: str, *, role: str) -> Any:
    """A causal language model's modules without their weights (on torch's `meta` device).

    Raises:
        ModelError: the folder or name cannot be loaded.
    """
    with _loading(f"{role} model", model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def set_mode(transformer: Any, *, gradient_checkpointing: bool) -> None:
    """No cache, no dropout (the ratios of a step's first update are then 1), activations kept or not.

    transformers checkpoints gradients in training mode only, so dropout must be switched off by itself.
    """
    transformer.config.use_cache = False
    transformer.eval()
    if gradient_checkpointing:
        transformer.train()
        transformer.gradient_checkpointing_enable()
        for module in transformer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0


def load_tokenizer(model: str, role: str) -> Any:
    """The tokenizer that belongs to a checkpoint.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    with _loading(f"tokenizer of {role} model", model):
        tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {role} model {model!r} has no eos_token, so a response could never end; "
            "set it in its tokenizer_config.json"
        )
    return tokenizer


def context_limit(model: str, role: str) -> int | None:
    """The longest sequence, prompt and response together, that a checkpoint says it was made for.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    with _loading(f"{role} model", model):
        config = AutoConfig.from_pretrained(model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


@contextmanager
def _loading(what: str, model: str) -> Iterator[None]:
    path = Path(model)
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelError(f"{what}: folder {model!r} does not exist")
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{what}: {model!r} has no config.json; it is not a checkpoint folder")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what} {model!r} cannot be loaded: {reason[0]}") from error


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every token the same number."""
    return one.get_vocab() == other.get_vocab()


def vocabulary_size(model: str) -> int:
    """Rows of a checkpoint's embedding."""
    with _loading("policy model", model):
        return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)


def check_checkpoint(model: str, role: str) -> None:
    """Load a checkpoint's configuration only.

    Raises:
        ModelError: the folder or name cannot be loaded.
    """
    with _loading(f"{role} model", model):
        AutoConfig.from_pretrained(model)
