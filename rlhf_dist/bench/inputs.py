"""`rlhf-dist bench inputs`: an untrained policy and prompts of one length, for any trainer.

    FOLDER/policy           Qwen2 in float32, 3.0 M parameters if no other size is asked for, with a tokenizer
    FOLDER/prompts.jsonl    prompts that the policy's tokenizer and chat template make equally long

Nothing is downloaded, and the same arguments write the same files.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rlhf_dist.data.templates import prompt_encoder
from rlhf_dist.driver.run_folder import write_atomically
from rlhf_dist.errors import ConfigError, StorageError
from rlhf_dist.tasks.tiny_models import head_dim, save_causal_lm, train_tokenizer

HIDDEN_SIZE = 192
NUM_LAYERS = 6
MAX_POSITIONS = 4096
VOCAB_SIZE = 1024
WORDS = tuple(map("".join, product("bdfglmnprst", "aeiou", "bdglmnrst", "aio")))
"""Made up of two syllables; frequent in the tokenizer's corpus, so that most are one token."""
NUM_WORDS = 240
CORPUS_LINES = 2000
TRIES = 1000


def make_inputs(
    folder: Path,
    *,
    num_prompts: int,
    prompt_tokens: int,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = NUM_LAYERS,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
) -> int:
    """Write both into a new folder; returns the policy's parameters. What fails leaves neither.

    Args:
        hidden_size: width of the policy.
        vocab_size: tokens of the tokenizer, at most.

    Raises:
        ConfigError: the folder is not empty or a file, no prompt is so short, or no model has that width.
        StorageError: nothing can be written there.
    """
    _check_new(folder)
    if hidden_size % head_dim(hidden_size):
        raise ConfigError(
            f"no model is {hidden_size} wide: attention heads are {head_dim(hidden_size)} wide there; name "
            "a multiple of that"
        )
    disable_progress_bar()
    draw = random.Random(seed)
    words = draw.sample(WORDS, NUM_WORDS)
    corpus = [" ".join(draw.choices(words, k=12)) for _ in range(CORPUS_LINES)]
    if vocab_size > VOCAB_SIZE:
        corpus += _rare_words(draw, vocab_size)
    tokenizer = train_tokenizer(corpus, vocab_size=vocab_size, max_positions=MAX_POSITIONS)
    length = _length(tokenizer)
    prompts = [_prompt(draw, words, prompt_tokens, length) for _ in range(num_prompts)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    policy = folder / "policy"
    with _nothing_left_of_a_failure(folder, policy):
        save_causal_lm(policy, tokenizer, seed=seed, hidden_size=hidden_size, num_layers=num_layers)
        write_atomically(folder / "prompts.jsonl", "\n".join(lines) + "\n")
    return AutoModelForCausalLM.from_pretrained(policy).num_parameters()


def _rare_words(draw: random.Random, num_words: int) -> list[str]:
    """Different words of four syllables, of which a tokenizer makes about as many tokens."""
    most = len(WORDS) ** 2
    if num_words > most:
        raise ConfigError(f"a vocabulary of {num_words:,} tokens is too large; {most:,} is the most")
    halves = (divmod(each, len(WORDS)) for each in draw.sample(range(most), num_words))
    return [WORDS[first] + WORDS[second] for first, second in halves]


def _check_new(folder: Path) -> None:
    try:
        taken = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} is no empty folder ({error.strerror}); name a new folder") from error
    if taken:
        raise ConfigError(f"{folder} is not empty; name a new folder")


@contextmanager
def _nothing_left_of_a_failure(folder: Path, policy: Path) -> Iterator[None]:
    """The policy is written first, so that prompts are there only with all of it."""
    try:
        yield
    except BaseException as error:  # Ctrl-C, too: the same command begins again
        shutil.rmtree(policy, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise StorageError(
                f"{folder} cannot be written ({error}); make room there, or name another folder"
            ) from error
        raise


def _length(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Of a user's words as a prompt, in tokens."""
    encoder = prompt_encoder(tokenizer, chat_template="auto", system_prompt=None)

    def length(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        return len(encoder.encode_prompt(messages, place="a prompt of the bench"))

    return length


def _prompt(draw: random.Random, words: Sequence[str], num_tokens: int, length: Callable[[str], int]) -> str:
    """Words drawn until they are of that length; begun again when they are over it."""
    for _ in range(TRIES):
        text = draw.choice(words)
        while length(text) < num_tokens:
            text += " " + draw.choice(words)
        if length(text) == num_tokens:
            return text
    raise ConfigError(f"no prompt has {num_tokens} tokens; the chat template alone takes nearly as many")
