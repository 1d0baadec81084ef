"""Prompts: the table, the length limit, and the endless order."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from rlhf_dist.data.prompts import PROMPT_SCHEMA, Fingerprint, PromptOrder, PromptSet, load_prompts
from rlhf_dist.data.settings import DataSettings
from rlhf_dist.data.shuffle import permutation
from rlhf_dist.errors import DataError

Write = Callable[..., str]


def test_table(write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl({"prompt": "ab", "answer": 3}, {"prompt": [{"role": "user", "content": "é"}]})
    prompts = load_prompts(DataSettings(prompts=source), plain_tokenizer, max_prompt_tokens=3)
    assert prompts.table.schema == PROMPT_SCHEMA
    rows = prompts.table.to_pylist()
    assert [row["row"] for row in rows] == [0, 1]
    assert [row["prompt"] for row in rows] == ["ab", "é"]
    assert [row["prompt_tokens"] for row in rows] == [
        plain_tokenizer(text)["input_ids"] for text in ("ab", "é")
    ]
    assert json.loads(rows[0]["columns"]) == {"prompt": "ab", "answer": 3}
    assert (len(prompts), prompts.num_skipped) == (2, 0)


def test_the_fingerprint_is_that_of_lengths_and_tokens() -> None:
    tokens = pa.chunked_array([[[1, 2], [3]], [[4]]], type=pa.list_(pa.int32()))
    fingerprint = PromptSet(pa.table({"prompt_tokens": tokens}), num_skipped=0).fingerprint()
    numbers = [2, 1, 1, *(1, 2, 3, 4)]
    content = b"".join(number.to_bytes(4, "little") for number in numbers)
    assert fingerprint == (3, xxhash.xxh3_128_hexdigest(content))


def test_other_prompts_have_another_fingerprint(
    write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    def fingerprint(*texts: str) -> Fingerprint:
        source = write_jsonl(*({"prompt": text} for text in texts))
        settings = DataSettings(prompts=source)
        return load_prompts(settings, plain_tokenizer, max_prompt_tokens=9).fingerprint()

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert fingerprint("ab", "c").num_prompts == 2
    others = [fingerprint(*texts) for texts in [("c", "ab"), ("ab", "c", "d"), ("ab", "d"), ("ab",)]]
    assert len({fingerprint("ab", "c"), *others}) == 5


def test_a_row_may_limit_its_response(write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl({"prompt": "a", "length": 3}, {"prompt": "b", "length": 8})
    settings = DataSettings(prompts=source, max_response_tokens_column="length")
    table = load_prompts(settings, plain_tokenizer, max_prompt_tokens=9).table
    assert table["max_response_tokens"].to_pylist() == [3, 8]
    table = load_prompts(DataSettings(prompts=source), plain_tokenizer, max_prompt_tokens=9).table
    assert table["max_response_tokens"].to_pylist() == [None, None]


@pytest.mark.parametrize("limit", [0, -1, 2.5, "3", True, None])
def test_a_limit_that_is_no_length_names_line_and_column(
    limit: object, write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl({"prompt": "a", "length": 3}, {"prompt": "b", "length": limit})
    settings = DataSettings(prompts=source, max_response_tokens_column="length")
    with pytest.raises(DataError, match=r"prompts\.jsonl line 2, column 'length': .* whole number from 1 on"):
        load_prompts(settings, plain_tokenizer, max_prompt_tokens=9)


def test_columns_that_json_does_not_know(tmp_path: Path, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    source = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "day": [date(2024, 2, 29)]}), source)
    table = load_prompts(DataSettings(prompts=source), plain_tokenizer, max_prompt_tokens=9).table
    assert json.loads(table["columns"][0].as_py()) == {"prompt": "a", "day": "2024-02-29"}


def test_over_the_limit_is_an_error(write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl({"prompt": "a"}, {"prompt": "abcd"}, {"prompt": "abcdef"})
    message = (
        r"prompts\.jsonl line 2: 5 tokens where the limit is 3 \(2 of 3 rows are over the limit, the longest "
        r"has 7 tokens\); set data\.over_limit=skip .* or a larger data\.max_prompt_tokens"
    )
    with pytest.raises(DataError, match=message):
        load_prompts(DataSettings(prompts=source), plain_tokenizer, max_prompt_tokens=3)


def test_over_the_limit_is_skipped_and_counted(
    write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl({"prompt": "abcd"}, {"prompt": "a"}, {"prompt": "abcdef"})
    settings = DataSettings(prompts=source, over_limit="skip")
    prompts = load_prompts(settings, plain_tokenizer, max_prompt_tokens=3)
    assert prompts.table["row"].to_pylist() == [1]
    assert prompts.num_skipped == 2


def test_all_skipped(write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(prompts=write_jsonl({"prompt": "abcd"}), over_limit="skip")
    with pytest.raises(
        DataError, match=r"prompts\.jsonl: nothing is left under the limit of 3 tokens.*larger"
    ):
        load_prompts(settings, plain_tokenizer, max_prompt_tokens=3)


def test_wrong_type_names_line_and_column(
    write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = DataSettings(prompts=write_jsonl({"prompt": "a"}, {"prompt": 5}))
    with pytest.raises(DataError, match=r"prompts\.jsonl line 2, column 'prompt': int 5 where a string"):
        load_prompts(settings, plain_tokenizer, max_prompt_tokens=9)


def test_missing_column_names_the_setting(
    write_jsonl: Write, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = DataSettings(prompts=write_jsonl({"question": "a"}))
    with pytest.raises(
        DataError, match=r"line 1: no column 'prompt'; it has 'question'; set data\.prompt_column"
    ):
        load_prompts(settings, plain_tokenizer, max_prompt_tokens=9)


def test_gsm8k(gsm8k_path: str, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(prompts=gsm8k_path, prompt_column="question", limit=300, chat_template="always")
    prompts = load_prompts(settings, chat_tokenizer, max_prompt_tokens=2000)
    assert len(prompts) == 300
    first = prompts.table.slice(0, 1).to_pylist()[0]
    assert first["prompt"].startswith("Natalia sold clips")
    assert chat_tokenizer.decode(first["prompt_tokens"]) == f"<s>[user]{first['prompt']}</s>[assistant]"
    assert json.loads(first["columns"])["answer"].endswith("#### 72")


@pytest.mark.parametrize("change", [{"limit": 0}, {"max_prompt_tokens": 0}, {"prompts": ""}, {"promts": "x"}])
def test_settings_refuse(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataSettings(**{"prompts": "p.jsonl", **change})


def test_order_is_the_same_everywhere() -> None:
    """Literal numbers: a change here would break the resumption of every existing run."""
    assert permutation(8, 1, 0).tolist() == [0, 5, 7, 4, 2, 6, 3, 1]
    assert PromptOrder(5, seed=3, shuffle=True).rows_of(range(10)) == [3, 2, 0, 1, 4, 1, 2, 0, 4, 3]


def test_order_without_shuffling() -> None:
    assert PromptOrder(3, seed=0, shuffle=False).rows_of(range(7)) == [0, 1, 2, 0, 1, 2, 0]


@given(st.integers(1, 50), st.integers(0, 2**70), st.integers(0, 10**6), st.booleans())
def test_each_epoch_has_every_row_once(num_rows: int, seed: int, epoch: int, shuffle: bool) -> None:
    order = PromptOrder(num_rows, seed, shuffle)
    start = epoch * num_rows
    assert sorted(order.rows_of(range(start, start + num_rows))) == list(range(num_rows))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=30), st.integers(0, 99))
def test_order_has_no_memory(ordinals: list[int], seed: int) -> None:
    used = PromptOrder(37, seed, shuffle=True)
    used.rows_of(range(100))
    assert used.rows_of(ordinals) == [PromptOrder(37, seed, shuffle=True).row_of(each) for each in ordinals]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [permutation(64, seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_order_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_rows=0"):
        PromptOrder(0, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="got -1"):
        PromptOrder(3, seed=0, shuffle=True).row_of(-1)
