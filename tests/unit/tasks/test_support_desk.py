"""The quickstart's task: its data, its reward, and the policy it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.errors import DataError
from rlhf_dist.tasks import support_desk

ASKED = {"prompt": "Where is my red lamp?", "article": "red lamp", "matter": "delivery"}


def score(response: str, asked: dict[str, str] = ASKED) -> float:
    columns = {name: [asked[name]] for name in ("article", "matter")}
    return support_desk.reward([asked["prompt"]], [response], columns)[0]


def documented_scores() -> list[tuple[float, str]]:
    """The examples in the table of the module's docstring."""
    table = (support_desk.__doc__ or "").split("=====\n")[2]
    rows = [line for line in table.splitlines() if line[:1].isdigit()]
    levels = {"1": 1.0, "2/3": 2 / 3, "1/3": 1 / 3, "0": 0.0}
    return [(levels[row[:5].strip()], row[7:63].strip()) for row in rows]


def test_docstring_has_every_level() -> None:
    assert {level for level, _ in documented_scores()} == {1.0, 2 / 3, 1 / 3, 0.0}
    assert len(documented_scores()) == 10


@pytest.mark.parametrize(("level", "response"), documented_scores())
def test_docstring_tells_the_truth(level: float, response: str) -> None:
    assert score(response) == pytest.approx(level)


@pytest.mark.parametrize(
    ("level", "response"),
    [
        (1, "Thank you for writing. Your red lamp will arrive on Monday. Thank you for your patience."),
        (1, "  Good morning! Your red lamp is on its way.\n"),
        (2 / 3, "Hello! It is on its way."),
        (2 / 3, "Hello! Your red lamp is on its way. Stop asking."),
        (2 / 3, "Hello! Your red mug is on its way."),
        (2 / 3, "Hello! Your blue lamp is on its way."),
        (1 / 3, "It is on its way."),
        (0, "Stop asking. So what?"),
        (0, ""),
        (0, "   \n"),
    ],
)
def test_levels(level: float, response: str) -> None:
    assert score(response) == pytest.approx(level)


@pytest.mark.parametrize(
    ("most", "response"),
    [
        # Naming more than one article, answering more than one matter.
        (2 / 3, "Hello! Your red lamp is on its way. We will refund your red lamp."),
        (2 / 3, "Hello! Your red lamp is on its way. Your blue mug will arrive on Monday."),
        (1 / 3, "Hello! Your red lamp is on its way. We will replace your blue mug."),
        # Length and repetition.
        (0, "Hello! Good morning! Your red lamp is on its way. Have a nice day."),
        (0, "Hello! Your red lamp is on its way. Your red lamp is on its way."),
        (0, "Hello! Your red lamp is on its way, so your red lamp is on its way."),
        (0, "Hello! " * 1000),
        # Keyword stuffing and babble.
        (0, "Hello thank you red lamp is on its way will arrive on Monday."),
        (0, "Hello! Red lamp red lamp is on its way."),
        (0, "Hello! Your red lampish is on its way."),
        (0, "Hello! Your red lamp is on its way 7 +."),
        (0, "Hello!!! Your red lamp is on its way."),
        (0, "hello! your red lamp is on its way."),
        (0, "Hello! Your red lamp is on its way. \u00e9\u00e9\u00e9."),
        # Cut off by the token limit.
        (0, "Hello! Your red lamp is on its way. Thank you for"),
    ],
)
def test_gaming_does_not_pay(most: float, response: str) -> None:
    assert score(response) == pytest.approx(most)


def test_a_hostile_response_costs_little() -> None:
    assert score("Hello " * 100_000 + "!") == 0
    assert score("A" * 500_000) == 0
    assert score("Hello, " * 100_000) == 0


@pytest.mark.parametrize("matter", support_desk.ANSWERS)
def test_every_answer_to_a_matter_can_score_1(matter: str) -> None:
    for sentence in support_desk.ANSWERS[matter]:
        answer = sentence.format(article="your red lamp")
        asked = {**ASKED, "matter": matter}
        assert score(f"Hello! {answer[0].upper()}{answer[1:]} Have a nice day.", asked) == 1


def test_a_batch_is_scored_sample_by_sample() -> None:
    columns = {"article": ["red lamp", "blue mug"], "matter": ["delivery", "refund"]}
    responses = ["Hello! Your red lamp is on its way."] * 2
    assert support_desk.reward(["", ""], responses, columns) == [1, pytest.approx(1 / 3)]


def test_prompts() -> None:
    rows = support_desk.prompts("train")
    assert len(rows) == 900
    assert len(support_desk.prompts("test")) == 180
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert set(rows[0]) == {"prompt", "article", "matter"}
    assert all(row["article"] in row["prompt"] for row in rows)
    assert rows == support_desk.prompts("train")


def test_splits_share_no_combination() -> None:
    train, test = (
        {(row["article"], row["matter"]) for row in support_desk.prompts(split)}
        for split in ("train", "test")
    )
    assert not train & test
    assert len(train) + len(test) == 6 * 10 * 6
    assert {article for article, _ in test} <= {article for article, _ in train}


def test_unknown_split() -> None:
    with pytest.raises(DataError, match="train and test, not 'validation'"):
        support_desk.prompts("validation")
    with pytest.raises(DataError, match="train and test, not 'validation'"):
        support_desk.demonstrations("validation")


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = support_desk.demonstrations("train")
    assert len(rows) == 2400
    assert rows == support_desk.demonstrations("train")
    asked = {row["prompt"]: row for row in support_desk.prompts("train")}
    scores = [score(row["response"], asked[row["prompt"]]) for row in rows]
    assert sum(scores) / len(scores) == pytest.approx(0.43, abs=0.02)
    assert sum(each == 1 for each in scores) / len(scores) == pytest.approx(0.14, abs=0.02)
    assert sum(support_desk.DEMONSTRATION_SHARES.values()) == pytest.approx(1)


def test_demonstrations_keep_to_their_split() -> None:
    held_out = {row["prompt"] for row in support_desk.prompts("test")}
    assert not held_out & {row["prompt"] for row in support_desk.demonstrations("train")}
    assert {row["prompt"] for row in support_desk.demonstrations("test")} <= held_out


def test_policy_loads_and_generates(tmp_path: Path) -> None:
    support_desk.make_policy(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert 400_000 < model.num_parameters() < 1_500_000
    assert model.config.tie_word_embeddings
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": ASKED["prompt"]}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(tokens, max_new_tokens=4)
    assert output.shape[1] <= tokens.shape[1] + 4


def test_tokens_are_words(tmp_path: Path) -> None:
    support_desk.make_policy(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.encode("Hello! Your red lamp is on its way.")) == 10
    chat = [{"role": "user", "content": ASKED["prompt"]}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nWhere is my red lamp?<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode(text)) == 14
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_same_seed_same_policy(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        support_desk.make_policy(tmp_path / name, seed=seed)
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def test_making_a_policy_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    support_desk.make_policy(tmp_path, seed=0)
    assert torch.equal(before, torch.get_rng_state())
