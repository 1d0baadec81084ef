"""`rlhf-dist bench inputs`: an untrained policy and prompts of one length, for any trainer.

    FOLDER/policy           Qwen2, 3.0 M parameters, float32, its tokenizer beside it
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
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm, train_tokenizer

HIDDEN_SIZE = 192
NUM_LAYERS = 6
MAX_POSITIONS = 4096
VOCAB_SIZE = 1024
WORDS = tuple(map("".join, product("bdfglmnprst", "aeiou", "bdglmnrst", "aio")))
"""Made up of two syllables; frequent in the tokenizer's corpus, so that most are one token."""
NUM_WORDS = 240
CORPUS_LINES = 2000
TRIES = 1000


def make_inputs(folder: Path, *, num_prompts: int, prompt_tokens: int, seed: int = 0) -> int:
    """Write both into a new folder; returns the policy's parameters. What fails leaves neither.

    Raises:
        ConfigError: the folder is not empty or a file, or no prompt is so short.
        StorageError: nothing can be written there.
    """
    _check_new(folder)
    disable_progress_bar()
    draw = random.Random(seed)
    words = draw.sample(WORDS, NUM_WORDS)
    corpus = [" ".join(draw.choices(words, k=12)) for _ in range(CORPUS_LINES)]
    length = _length(train_tokenizer(corpus, vocab_size=VOCAB_SIZE, max_positions=MAX_POSITIONS))
    prompts = [_prompt(draw, words, prompt_tokens, length) for _ in range(num_prompts)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    policy = folder / "policy"
    with _nothing_left_of_a_failure(folder, policy):
        save_tiny_causal_lm(
            policy,
            corpus,
            seed=seed,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            num_layers=NUM_LAYERS,
            max_positions=MAX_POSITIONS,
        )
        write_atomically(folder / "prompts.jsonl", "\n".join(lines) + "\n")
    return AutoModelForCausalLM.from_pretrained(policy).num_parameters()


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
