"""Loads the prompts of a run into one Arrow table, and orders them: ordinals 0, 1, 2, ... run for ever.

Ordinals name prompts everywhere else (queue, ledger, journal). Which row an ordinal means follows
from (seed, number of rows) alone, so nothing but the next ordinal has to be saved for a resumed run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from rlhf_dist.data.settings import DataSettings
from rlhf_dist.data.shuffle import permutation
from rlhf_dist.data.sources import Rows, read_rows
from rlhf_dist.data.templates import PromptEncoder, as_messages, last_user_text, prompt_encoder
from rlhf_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # in the source, counted from 0
        pa.field("prompt", pa.string(), nullable=False),  # as in the source; of messages, the last user's
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),  # rendered
        pa.field("columns", pa.string(), nullable=False),  # JSON object of the row's columns, for rewards
        pa.field("max_response_tokens", pa.int32()),  # null: the run's limit is the only one
    ]
)


class Fingerprint(NamedTuple):
    """What tells the prompts of one run from those of another."""

    num_prompts: int
    xxh3_128: str
    """Of the lengths, then of the tokens."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts that can be used."""

    table: pa.Table
    """`PROMPT_SCHEMA`, in the order of the source."""

    num_skipped: int
    """Rows of the source that were left out for their length."""

    def __len__(self) -> int:
        return self.table.num_rows

    def fingerprint(self) -> Fingerprint:
        """Of how many prompts there are, their tokens and their order."""
        tokens = self.table["prompt_tokens"]
        hasher = xxhash.xxh3_128()
        for column in (pc.list_value_length(tokens), pc.list_flatten(tokens)):
            for chunk in column.chunks:
                hasher.update(chunk.to_numpy())
        return Fingerprint(len(self), hasher.hexdigest())


def load_prompts(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int
) -> PromptSet:
    """Reads, checks, renders and tokenizes every prompt; a row that cannot be used is a `DataError`."""
    rows = read_rows(
        settings.prompts, split=settings.split, config_name=settings.config_name, limit=settings.limit
    )
    encoder = prompt_encoder(
        tokenizer, chat_template=settings.chat_template, system_prompt=settings.system_prompt
    )
    encoded = [_encode(rows, index, settings.prompt_column, encoder) for index in range(len(rows))]
    kept = within_limit(
        rows,
        [len(tokens) for _, tokens in encoded],
        max_prompt_tokens,
        skip=settings.over_limit == "skip",
        section="data",
        limit_setting="max_prompt_tokens",
    )
    table = pa.table(
        {
            "row": kept,
            "prompt": [encoded[index][0] for index in kept],
            "prompt_tokens": [encoded[index][1] for index in kept],
            "columns": [_columns_json(rows, index) for index in kept],
            "max_response_tokens": [
                _response_limit(rows, index, settings.max_response_tokens_column) for index in kept
            ],
        },
        schema=PROMPT_SCHEMA,
    )
    return PromptSet(table, num_skipped=len(rows) - len(kept))


def _encode(rows: Rows, index: int, column: str, encoder: PromptEncoder) -> tuple[str, list[int]]:
    """(prompt as in the source, tokens of the rendered prompt)."""
    place = f"{rows.place(index)}, column {column!r}"
    messages = as_messages(rows.value(index, column, setting="data.prompt_column"), place=place)
    return last_user_text(messages), encoder.encode_prompt(messages, place=place)


def _response_limit(rows: Rows, index: int, column: str | None) -> int | None:
    if column is None:
        return None
    limit = rows.value(index, column, setting="data.max_response_tokens_column")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise DataError(
            f"{rows.place(index)}, column {column!r}: {limit!r} where a whole number from 1 on is needed; "
            "fix or remove the row, or name another column"
        )
    return limit


def _columns_json(rows: Rows, index: int) -> str:
    """Values that JSON does not know (dates, decimals, bytes) go in as their text."""
    return json.dumps(rows.rows[index], default=str)


def within_limit(
    rows: Rows, num_tokens: list[int], max_tokens: int, *, skip: bool, section: str, limit_setting: str
) -> list[int]:
    """Indices of the rows with at most `max_tokens`; the others are left out, or are an error."""
    over = [index for index, count in enumerate(num_tokens) if count > max_tokens]
    over_text = (
        f"{len(over)} of {len(rows)} rows are over the limit, the longest has {max(num_tokens)} tokens"
    )
    if over and not skip:
        raise DataError(
            f"{rows.place(over[0])}: {num_tokens[over[0]]} tokens where the limit is {max_tokens} "
            f"({over_text}); set {section}.over_limit=skip to leave such rows out, "
            f"or a larger {section}.{limit_setting} if the model's context has room"
        )
    if len(over) == len(rows):
        raise DataError(
            f"{rows.source}: nothing is left under the limit of {max_tokens} tokens ({over_text}); "
            f"set a larger {section}.{limit_setting}, or use other data"
        )
    return [index for index, count in enumerate(num_tokens) if count <= max_tokens]


class PromptOrder:
    """Which row of a table a prompt ordinal means: every row once an epoch, for ever.

    Epoch e holds the ordinals from e * num_rows; its order follows from (seed, e) alone.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        if num_rows < 1:
            raise ValueError(f"an order needs at least one row, got num_rows={num_rows}")
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self._last: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def row_of(self, ordinal: int) -> int:
        """The row that prompt `ordinal` (0, 1, 2, ...) means."""
        if ordinal < 0:
            raise ValueError(f"prompt ordinals start at 0, got {ordinal}")
        epoch, position = divmod(ordinal, self.num_rows)
        return int(self._permutation(epoch)[position]) if self.shuffle else position

    def rows_of(self, ordinals: Iterable[int]) -> list[int]:
        """The row of each ordinal."""
        return [self.row_of(ordinal) for ordinal in ordinals]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._last[0] != epoch:
            self._last = (epoch, permutation(self.num_rows, self.seed, epoch))
        return self._last[1]
