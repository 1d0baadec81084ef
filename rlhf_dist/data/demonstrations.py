"""Loads demonstrations (a prompt and its response) for supervised fine-tuning into one Arrow table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from rlhf_dist.data.prompts import within_limit
from rlhf_dist.data.settings import SFTSettings
from rlhf_dist.data.sources import Rows, read_rows
from rlhf_dist.data.templates import PromptEncoder, as_messages, check_text, prompt_encoder
from rlhf_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMONSTRATION_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # in the source, counted from 0
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),  # as a rollout would be given them
        pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),  # the last one is the EOS
    ]
)


@dataclass(frozen=True)
class DemonstrationSet:
    """The demonstrations that can be used."""

    table: pa.Table
    """`DEMONSTRATION_SCHEMA`, in the order of the source."""

    num_skipped: int
    """Rows of the source that were left out for their length."""

    def __len__(self) -> int:
        return self.table.num_rows


def load_demonstrations(
    settings: SFTSettings, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> DemonstrationSet:
    """Reads, checks and tokenizes every demonstration; `max_tokens` bounds prompt and response together."""
    rows = read_rows(
        settings.demonstrations,
        split=settings.split,
        config_name=settings.config_name,
        limit=settings.limit,
        kind="demonstrations",
    )
    encoder = prompt_encoder(
        tokenizer, chat_template=settings.chat_template, system_prompt=settings.system_prompt
    )
    encoded = [_encode(rows, index, settings, encoder) for index in range(len(rows))]
    kept = within_limit(
        rows,
        [len(prompt) + len(response) for prompt, response in encoded],
        max_tokens,
        skip=settings.over_limit == "skip",
        section="sft",
        limit_setting="max_tokens",
    )
    table = pa.table(
        {
            "row": kept,
            "prompt_tokens": [encoded[index][0] for index in kept],
            "response_tokens": [encoded[index][1] for index in kept],
        },
        schema=DEMONSTRATION_SCHEMA,
    )
    return DemonstrationSet(table, num_skipped=len(rows) - len(kept))


def _encode(
    rows: Rows, index: int, settings: SFTSettings, encoder: PromptEncoder
) -> tuple[list[int], list[int]]:
    place = f"{rows.place(index)}, column {settings.prompt_column!r}"
    messages = as_messages(
        rows.value(index, settings.prompt_column, setting="sft.prompt_column"), place=place
    )
    return encoder.encode_demonstration(messages, _response(rows, index, settings), place=place)


def _response(rows: Rows, index: int, settings: SFTSettings) -> str:
    place = f"{rows.place(index)}, column {settings.response_column!r}"
    response = check_text(
        rows.value(index, settings.response_column, setting="sft.response_column"), place=place
    )
    if not response.strip():
        raise DataError(f"{place}: the response is empty; fill it in or remove the row")
    return response
