"""Real tokenizers, small enough to build in a test: one token a byte, plus one merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 256, 257

# Writes its own BOS, ends a turn with the EOS, and refuses roles it does not know, as real ones do.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _build_tokenizer(
    *, adds: str = "<s> $A", chat_template: str | None = None, eos_token: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocab, "<s>": BOS, "</s>": EOS, "qz": 258}, [("q", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos_token, chat_template=chat_template
    )


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Takes what the tokenizer `adds` around a text by itself, its `chat_template` and its `eos_token`."""
    return _build_tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return _build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return _build_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a file of the test's folder and returns its path."""

    def write(*rows: dict[str, Any], name: str = "prompts.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def gsm8k_path() -> str:
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k_train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the GSM8K questions are not present ({path.name})")
    return str(path)
