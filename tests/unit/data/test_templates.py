"""Rendering: exact tokens with and without a chat template, and the errors for unusable rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_dist.data.templates import as_messages, check_text, last_user_text, prompt_encoder
from rlhf_dist.errors import DataError, ModelError

# What every tokenizer of these tests calls <s> and </s>.
BOS, EOS = 256, 257

Build = Callable[..., PreTrainedTokenizerFast]

USER = [{"role": "user", "content": "Hi?"}]
TALK = [*USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


def letters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_template_text_gets_no_second_bos(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = prompt_encoder(chat_tokenizer)
    assert encoder.prompt_text(USER) == "<s>[user]Hi?</s>[assistant]"
    tokens = encoder.encode_prompt(USER)
    assert tokens == [
        BOS, *letters(chat_tokenizer, "[user]Hi?"), EOS, *letters(chat_tokenizer, "[assistant]")
    ]  # fmt: skip


def test_conversation_and_system_prompt(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = prompt_encoder(chat_tokenizer, system_prompt="Be kind.")
    expected = "<s>[system]Be kind.</s>[user]Hi?</s>[assistant]Yes.</s>[user]Why?</s>[assistant]"
    assert encoder.prompt_text(TALK) == expected


def test_a_row_keeps_its_own_system_message(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    text = prompt_encoder(chat_tokenizer, system_prompt="Be kind.").prompt_text(messages)
    assert text == "<s>[system]Be brief.</s>[user]Hi?</s>[assistant]"


@pytest.mark.parametrize(
    ("adds", "before"), [("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", []), ("$A", [])]
)
def test_plain_text_has_the_tokenizers_own_tokens_but_no_eos(
    build_tokenizer: Build, adds: str, before: list[int]
) -> None:
    tokenizer = build_tokenizer(adds=adds)
    assert prompt_encoder(tokenizer).encode_prompt(USER) == [*before, *letters(tokenizer, "Hi?")]


@pytest.mark.parametrize("adds", ["$A", "$A </s>"])
def test_an_eos_that_the_prompt_spells_out_stays(build_tokenizer: Build, adds: str) -> None:
    tokenizer = build_tokenizer(adds=adds)
    messages = as_messages("Hi</s>", place="row")
    assert prompt_encoder(tokenizer).encode_prompt(messages) == [*letters(tokenizer, "Hi"), EOS]


def test_system_prompt_without_a_template(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_encoder(plain_tokenizer, system_prompt="Be kind.").prompt_text(USER) == "Be kind.\n\nHi?"


def test_never_leaves_the_template_out(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_encoder(chat_tokenizer, chat_template="never").prompt_text(USER) == "Hi?"


def test_always_needs_a_template(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ModelError, match=r"chat_template=always.*has no chat template; set chat_template=auto"
    ):
        prompt_encoder(plain_tokenizer, chat_template="always")


def test_conversation_without_a_template(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl line 3: .*user, assistant, user needs a chat template"):
        prompt_encoder(plain_tokenizer).encode_prompt(TALK, place="p.jsonl line 3")


def test_template_that_refuses(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [*USER, {"role": "wizard", "content": "!"}]
    with pytest.raises(
        DataError, match=r"p\.jsonl line 3: .*refuses the messages \(unknown role\); fix the row"
    ):
        prompt_encoder(chat_tokenizer).encode_prompt(messages, place="p.jsonl line 3")


@pytest.mark.parametrize("has_template", [False, True])
def test_demonstration_continues_the_prompt_and_ends_with_eos(
    build_tokenizer: Build, chat_tokenizer: PreTrainedTokenizerFast, has_template: bool
) -> None:
    template = chat_tokenizer.chat_template if has_template else None
    tokenizer = build_tokenizer(adds="<s> $A </s>", chat_template=template)
    encoder = prompt_encoder(tokenizer)
    prompt, response = encoder.encode_demonstration(USER, "Hello.")
    assert prompt == encoder.encode_prompt(USER)
    assert response == [*letters(tokenizer, "Hello."), EOS]


def test_response_with_its_own_eos_gets_no_second(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    _, response = prompt_encoder(chat_tokenizer).encode_demonstration(USER, "Hello.</s>")
    assert response == [*letters(chat_tokenizer, "Hello."), EOS]


def test_a_token_over_the_border_does_not_change_the_prompt(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(letters(plain_tokenizer, "qz")) == 1
    messages = as_messages("q", place="row")
    prompt, response = prompt_encoder(plain_tokenizer).encode_demonstration(messages, "z")
    assert prompt == [BOS, *letters(plain_tokenizer, "q")]
    assert response == [*letters(plain_tokenizer, "z"), EOS]


def test_demonstrations_need_an_eos(build_tokenizer: Build) -> None:
    with pytest.raises(ModelError, match=r"no EOS token.*set eos_token"):
        prompt_encoder(build_tokenizer(eos_token=None)).encode_demonstration(USER, "Hello.")


def test_messages() -> None:
    assert as_messages("Hi?", place="row") == USER
    assert as_messages(TALK, place="row") == TALK
    assert last_user_text(TALK) == "Why?"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"row 7: NoneType None where a string or a list .*; fix or remove the row"),
        (5, r"row 7: int 5 where a string or a list of \{role, content\} messages is needed"),
        ("  ", r"row 7: the user's text is empty; fill it in or remove the row"),
        ([], r"row 7: the conversation must end with a message to answer"),
        ([{"role": "system", "content": "x"}], r"row 7: the user's text is empty"),
        (TALK[:2], r"row 7: .*remove the final assistant message"),
        (["Hi?"], r"row 7, message 1: str 'Hi\?' where \{role, content\} is needed"),
        ([*USER, {"role": "user"}], r"row 7, message 2: dict .* where \{role, content\} is needed"),
        ([{"role": "user", "content": ["x"]}], r"row 7, message 1, content: list \['x'\] where a string"),
        ("\ud83d", r"row 7, message 1, content: character 1 is half of a surrogate pair; fix or remove"),
    ],
)
def test_what_is_no_prompt(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_messages(value, place="row 7")


def test_long_values_are_shown_short() -> None:
    with pytest.raises(DataError) as error:
        check_text(list(range(1000)), place="row 7")
    assert len(str(error.value)) < 150
