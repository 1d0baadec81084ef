"""Renders prompts and demonstrations to tokens, with the tokenizer's chat template or as plain text.

A prompt's tokens are what the rollout engine is given, so that training and sampling see the same ones.
A template writes its special tokens as text, so its text is tokenized without adding any (no second BOS).
Plain text gets the special tokens that the tokenizer adds by itself, but never an EOS after a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_dist.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# Between the system prompt and the prompt where there is no template to tell them apart.
PLAIN_SEPARATOR = "\n\n"


def as_messages(value: Any, *, place: str) -> list[Message]:
    """The messages of a prompt column's value; `place` names the row and the column in errors."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise DataError(
            f"{place}: {_shown(value)} where a string or a list of {{role, content}} messages is needed; "
            "fix or remove the row, or name another column"
        )
    for number, message in enumerate(value, start=1):
        _check_message(message, f"{place}, message {number}")
    if not value or value[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the conversation must end with a message to answer; "
            "remove the final assistant message, or the row"
        )
    if not last_user_text(value).strip():
        raise DataError(f"{place}: the user's text is empty; fill it in or remove the row")
    return value


def last_user_text(messages: list[Message]) -> str:
    """Content of the last user message, or '' when there is none."""
    return next((each["content"] for each in reversed(messages) if each["role"] == "user"), "")


def check_text(value: Any, *, place: str) -> str:
    """`value` if it is a string that UTF-8 can hold (JSON escapes can spell halves of characters)."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {_shown(value)} where a string is needed; fix or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start + 1} is half of a surrogate pair; fix or remove the row"
        ) from error
    return value


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(
            f"{place}: {_shown(message)} where {{role, content}} is needed; fix or remove the row"
        )
    check_text(message["role"], place=f"{place}, role")
    check_text(message["content"], place=f"{place}, content")


@dataclass(frozen=True)
class PromptEncoder:
    """Messages in, tokens out; `place` in the methods names the row in errors."""

    tokenizer: PreTrainedTokenizerBase
    use_template: bool
    system_prompt: str | None

    def prompt_text(self, messages: list[Message], *, place: str = "prompt") -> str:
        """The text the model continues: through the template, or the contents alone."""
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return self._template_text(messages, place) if self.use_template else _plain_text(messages, place)

    def encode_prompt(self, messages: list[Message], *, place: str = "prompt") -> list[int]:
        """Tokens of the prompt, ready to be continued."""
        return self._tokens(self.prompt_text(messages, place=place))

    def encode_demonstration(
        self, messages: list[Message], response: str, *, place: str = "prompt"
    ) -> tuple[list[int], list[int]]:
        """(prompt tokens, response tokens); the response ends with the EOS, which a sampled one stops at.

        Prompt and response are tokenized as one text where that leaves the prompt's tokens as they
        are; where a token would span the border, each by itself.
        """
        prompt_text = self.prompt_text(messages, place=place)
        prompt_tokens = self._tokens(prompt_text)
        tokens = self._tokens(prompt_text + response)
        if tokens[: len(prompt_tokens)] == prompt_tokens:
            response_tokens = tokens[len(prompt_tokens) :]
        else:
            response_tokens = self._tokens_without_special(response)
        eos = end_token(self.tokenizer)
        return prompt_tokens, response_tokens if response_tokens[-1:] == [eos] else [*response_tokens, eos]

    def _template_text(self, messages: list[Message], place: str) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise DataError(
                f"{place}: the tokenizer's chat template refuses the messages ({error}); "
                "fix the row, or set chat_template=never"
            ) from error

    def _tokens(self, text: str) -> list[int]:
        if self.use_template:
            return self._tokens_without_special(text)
        tokens = self.tokenizer(text, verbose=False)["input_ids"]
        if not tokens or tokens[-1] != self.tokenizer.eos_token_id:
            return tokens
        plain = self._tokens_without_special(text)
        ends_by_itself = tokens[len(tokens) - len(plain) :] == plain
        return tokens if ends_by_itself else tokens[:-1]

    def _tokens_without_special(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_encoder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: Literal["auto", "always", "never"] = "auto",
    system_prompt: str | None = None,
) -> PromptEncoder:
    """The encoder that the settings ask for."""
    has_template = bool(tokenizer.chat_template)
    if chat_template == "always" and not has_template:
        raise ModelError(
            f"chat_template=always, but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "set chat_template=auto or never, or use a chat model's tokenizer"
        )
    return PromptEncoder(tokenizer, has_template and chat_template != "never", system_prompt)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a response (for chat tokenizers, the one that ends the turn)."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _plain_text(messages: list[Message], place: str) -> str:
    roles = [each["role"] for each in messages]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(
            f"{place}: a conversation of {', '.join(roles)} needs a chat template, and none is in use; "
            "use a chat model's tokenizer, or rows of one user message"
        )
    return PLAIN_SEPARATOR.join(each["content"] for each in messages)


def _shown(value: Any) -> str:
    """`value` for a message, short."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
