"""Demonstrations: the table, the length limit and the settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from rlhf_dist.data.demonstrations import DEMONSTRATION_SCHEMA, load_demonstrations
from rlhf_dist.data.settings import SFTSettings
from rlhf_dist.errors import DataError

Write = Callable[..., str]


def test_table(write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl({"prompt": "ab", "response": "c"}, {"prompt": "d", "response": "efghi"})
    settings = SFTSettings(demonstrations=source, over_limit="skip")
    demonstrations = load_demonstrations(settings, plain_tokenizer, max_tokens=5)
    assert demonstrations.table.schema == DEMONSTRATION_SCHEMA
    tokens = plain_tokenizer("abc")["input_ids"]
    assert demonstrations.table.to_pylist() == [
        {"row": 0, "prompt_tokens": tokens[:3], "response_tokens": [tokens[3], plain_tokenizer.eos_token_id]}
    ]
    assert (len(demonstrations), demonstrations.num_skipped) == (1, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"line 1: no column 'response'; it has 'prompt'; set sft\.response_column"),
        ({"response": "a"}, r"line 1: no column 'prompt'; it has 'response'; set sft\.prompt_column"),
        ({"prompt": "a", "response": " "}, r"line 1, column 'response': the response is empty; fill it in"),
        ({"prompt": "a", "response": 4}, r"line 1, column 'response': int 4 where a string is needed"),
        ({"prompt": "a", "response": "x" * 50}, r"line 1: 53 tokens where the limit is 9 .*sft\.max_tokens"),
    ],
)
def test_rows_that_cannot_be_used(
    write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast, row: dict[str, object], message: str
) -> None:
    settings = SFTSettings(demonstrations=write_jsonl(row, name="demos.jsonl"))
    with pytest.raises(DataError, match=r"demos\.jsonl " + message):
        load_demonstrations(settings, plain_tokenizer, max_tokens=9)


def test_gsm8k(gsm8k_path: str, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = SFTSettings(
        demonstrations=gsm8k_path, prompt_column="question", response_column="answer", limit=50
    )
    table = load_demonstrations(settings, plain_tokenizer, max_tokens=2000).table
    first = table["response_tokens"][0].as_py()
    assert first[-1] == plain_tokenizer.eos_token_id
    assert plain_tokenizer.decode(first).endswith("#### 72</s>")


def test_warmup_fits_into_the_steps() -> None:
    with pytest.raises(ValidationError, match="warmup_steps=9 is more than num_steps=5"):
        SFTSettings(demonstrations="d.jsonl", num_steps=5, warmup_steps=9)
