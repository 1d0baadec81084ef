"""The quickstart's task, made wholly by code: a customer writes to a shop, the policy writes a short reply.

A prompt names an article (a colour and a thing) and a matter (late, damaged, refund, ...)::

    Where is my red lamp?

The demonstrations are of mixed quality, in the shares of `DEMONSTRATION_SHARES`, so that supervised
training alone gives readable sentences with a middling reward, and reinforcement learning has to find
out which of the habits it copied are the good ones. `reward` adds a third for each of three virtues:

=====  ========================================================  =====================================
score  reply to "Where is my red lamp?"                          why
=====  ========================================================  =====================================
1      Hello! Your red lamp is on its way.                       article, answer, courtesy
2/3    Your red lamp is on its way.                              not courteous
2/3    Hello! Your blue mug is on its way.                       another article
2/3    Hello! We will refund your red lamp.                      answers another matter
1/3    Hello! We will look into it.                              neither article nor answer
1/3    It is on its way, so stop asking.                         rude, no article
0      Not our problem.                                          none of the three
0      Hello! Your red lamp is on its                            unfinished
0      Hello! Hello! Your red lamp is on its way.                says something twice
0      Hello thank you lamp red way.                             babble
=====  ========================================================  =====================================

Gaming it does not pay. Naming a second article forfeits the article's third, answering a second matter
forfeits the answer's, anything rude forfeits courtesy's. A reply counts at all only if it is complete
and of at most three sentences, repeats nothing, and joins its words as the shop's own sentences do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path

from rlhf_dist.errors import DataError
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm

COLOURS = ("red", "blue", "green", "black", "white", "yellow")
THINGS = ("lamp", "mug", "chair", "clock", "kettle", "bowl", "rug", "scarf", "bag", "vase")

QUESTIONS = {
    "delivery": (
        "Where is my {article}?",
        "When will my {article} arrive?",
        "My {article} is late.",
    ),
    "damage": (
        "My {article} arrived broken.",
        "The {article} you sent has a crack.",
        "There is a hole in my {article}.",
    ),
    "refund": (
        "I want my money back for the {article}.",
        "Can I get a refund for my {article}?",
        "Please refund the {article}.",
    ),
    "cancel": (
        "Please cancel my {article}.",
        "I do not want the {article} any more.",
        "Can you cancel the order for my {article}?",
    ),
    "price": (
        "How much is the {article}?",
        "What does the {article} cost?",
        "What is the price of a {article}?",
    ),
    "hours": (
        "When can I collect my {article}?",
        "Are you open if I come for the {article}?",
        "What are your hours? I want to see the {article}.",
    ),
}

ANSWERS = {
    "delivery": ("{article} is on its way.", "{article} will arrive on Monday."),
    "damage": ("We will replace {article}.", "We will send you a new one for {article}."),
    "refund": ("We will refund {article}.", "You will get your money back for {article}."),
    "cancel": ("We have cancelled {article}.", "The order for {article} is cancelled."),
    "price": ("{article} costs ten pounds.", "The price of {article} is ten pounds."),
    "hours": ("You can collect {article} from nine to five.", "We are open until six for {article}."),
}
"""Sentences that answer a matter; `{article}` stands for "your red lamp", or "it" where none is named."""

ANSWER_MARKS = {
    "delivery": ("is on its way", "will arrive on monday"),
    "damage": ("we will replace", "we will send you a new one"),
    "refund": ("we will refund", "you will get your money back"),
    "cancel": ("we have cancelled", "is cancelled"),
    "price": ("costs ten pounds", "is ten pounds"),
    "hours": ("from nine to five", "we are open until six"),
}
"""What shows in lower case that a reply answers a matter."""

OPENINGS = ("Hello!", "Good morning!", "Thank you for writing.")
CLOSINGS = ("Thank you for your patience.", "Have a nice day.")
COURTESY_MARKS = ("hello", "good morning", "thank you", "have a nice day")

VAGUE_SENTENCES = ("We will look into it.", "Someone will answer you soon.", "Please wait a little.")
RUDE_SENTENCES = ("Not our problem.", "So what?", "Read the manual.", "Stop asking.", "You again?")
RUDE_ENDINGS = (", so stop asking.", ", so leave us alone.")
RUDE_MARKS = ("not our problem", "so what", "read the manual", "stop asking", "you again", "leave us alone")

DEMONSTRATION_SHARES = {
    "good": 0.14,
    "wrong article": 0.14,
    "wrong matter": 0.10,
    "curt": 0.12,
    "vague": 0.15,
    "rude": 0.25,
    "rambling": 0.10,
}
"""How often a demonstration is of each quality."""

NUM_DEMONSTRATIONS = {"train": 2400, "test": 240}
HELD_OUT_EVERY = 6
"""One combination of article and matter in this many belongs to the test split."""
MAX_SENTENCES = 3
RUN_LENGTH = 4
"""A reply that has the same run of this many words twice repeats itself."""

_NUM_POSITIONS = 256
_SENTENCE = re.compile(r"[A-Z][a-z]*(?:,? [A-Za-z]+)*[.!?]")
_REPLY = re.compile(rf"{_SENTENCE.pattern}(?: {_SENTENCE.pattern})*")
_WORD = re.compile(r"[a-z]+")


def prompts(split: str) -> list[dict[str, str]]:
    """All questions of a split, shuffled once: rows of `prompt`, `article`, `matter`.

    `split` is "train" (900 rows) or "test" (180 rows); no combination of article and matter is in both.
    """
    rows = [
        {"prompt": question.format(article=article), "article": article, "matter": matter}
        for article, matter in _combinations(split)
        for question in QUESTIONS[matter]
    ]
    random.Random(f"support-desk prompts {split}").shuffle(rows)
    return rows


def demonstrations(split: str) -> list[dict[str, str]]:
    """Replies of mixed quality to questions of the same split: rows of `prompt`, `response`."""
    questions = prompts(split)
    chance = random.Random(f"support-desk demonstrations {split}")
    qualities = list(DEMONSTRATION_SHARES)
    shares = list(DEMONSTRATION_SHARES.values())
    rows = []
    for index in range(NUM_DEMONSTRATIONS[split]):
        asked = questions[index % len(questions)]
        quality = chance.choices(qualities, shares)[0]
        response = _write_reply(quality, asked["article"], asked["matter"], chance)
        rows.append({"prompt": asked["prompt"], "response": response})
    return rows


def reward(prompts: list[str], responses: list[str], columns: dict[str, list]) -> list[float]:  # noqa: ARG001
    """Score each response between 0 and 1 as the table on top says.

    `columns["article"]` and `columns["matter"]` say what each prompt asked about.
    """
    asked = zip(responses, columns["article"], columns["matter"], strict=True)
    return [_score(response, article, matter) for response, article, matter in asked]


def make_policy(folder: Path, *, seed: int) -> None:
    """Write an untrained Qwen2 of half a million parameters, with a tokenizer for this task, to `folder`."""
    corpus = [text for row in demonstrations("train") for text in row.values()]
    save_tiny_causal_lm(folder, corpus, seed=seed, max_positions=_NUM_POSITIONS)


def _combinations(split: str) -> list[tuple[str, str]]:
    """The (article, matter) pairs of a split."""
    if split not in NUM_DEMONSTRATIONS:
        raise DataError(f"task support-desk has the splits train and test, not {split!r}")
    articles = [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
    pairs = list(product(articles, QUESTIONS))
    random.Random("support-desk split").shuffle(pairs)
    in_test = [index % HELD_OUT_EVERY == 0 for index in range(len(pairs))]
    return [pair for pair, is_test in zip(pairs, in_test, strict=True) if is_test == (split == "test")]


def _write_reply(quality: str, article: str, matter: str, chance: random.Random) -> str:
    """A reply of the named quality."""
    if quality == "good":
        return _courteous(_answer(f"your {article}", matter, chance), chance)
    if quality == "wrong article":
        return _courteous(_answer(f"your {_another_article(article, chance)}", matter, chance), chance)
    if quality == "wrong matter":
        other = chance.choice([name for name in ANSWERS if name != matter])
        return _courteous(_answer(f"your {article}", other, chance), chance)
    if quality == "curt":
        return _answer("it", matter, chance)
    if quality == "vague":
        return _courteous(chance.choice(VAGUE_SENTENCES), chance)
    if quality == "rambling":
        return " ".join([_answer(f"your {article}", matter, chance)] * 2)
    return _rude(matter, chance)


def _rude(matter: str, chance: random.Random) -> str:
    """An answer with a rude ending, or rude sentences that answer nothing."""
    if chance.random() < 0.5:
        return _answer("it", matter, chance)[:-1] + chance.choice(RUDE_ENDINGS)
    return " ".join(chance.sample(RUDE_SENTENCES, chance.choice((1, 2))))


def _another_article(article: str, chance: random.Random) -> str:
    """An article of another colour, or another thing of the same colour."""
    colour, thing = article.split()
    if chance.random() < 0.5:
        return f"{chance.choice([other for other in COLOURS if other != colour])} {thing}"
    return f"{colour} {chance.choice([other for other in THINGS if other != thing])}"


def _answer(article: str, matter: str, chance: random.Random) -> str:
    """One sentence that answers a matter."""
    return _fill(chance.choice(ANSWERS[matter]), article)


def _fill(sentence: str, article: str) -> str:
    """Put the article into a sentence, and a capital in front."""
    filled = sentence.format(article=article)
    return filled[0].upper() + filled[1:]


def _courteous(sentence: str, chance: random.Random) -> str:
    """The sentence after an opening, before a closing, or between both."""
    form = chance.choice(("opening", "opening", "closing", "both"))
    parts = [sentence]
    if form != "closing":
        parts.insert(0, chance.choice(OPENINGS))
    if form != "opening":
        parts.append(chance.choice(CLOSINGS))
    return " ".join(parts)


def _score(response: str, article: str, matter: str) -> float:
    """The share of the three virtues that an acceptable reply has; 0 for any other."""
    if not _is_acceptable(response):
        return 0.0
    text = response.lower()
    virtues = (_names_only(text, article), _answers_only(text, matter), _is_courteous(text))
    return sum(virtues) / len(virtues)


def _is_acceptable(response: str) -> bool:
    """Whether the reply is complete, short, without repetition and without babble."""
    if not _REPLY.fullmatch(response.strip()):
        return False  # cut off, or not made of sentences
    sentences = [tuple(_words(sentence)) for sentence in _SENTENCE.findall(response)]
    if len(sentences) > MAX_SENTENCES or _repeats_itself(sentences):
        return False
    return all(pair in _known_pairs() for sentence in sentences for pair in _pairs(sentence))


def _repeats_itself(sentences: list[tuple[str, ...]]) -> bool:
    """Whether a sentence, or a run of `RUN_LENGTH` words within sentences, occurs twice."""
    runs = [words[i : i + RUN_LENGTH] for words in sentences for i in range(len(words) - RUN_LENGTH + 1)]
    return len(set(sentences)) < len(sentences) or len(set(runs)) < len(runs)


def _names_only(text: str, article: str) -> bool:
    """Whether the reply names the article, and no other colour or thing."""
    named = {word for word in _words(text) if word in COLOURS or word in THINGS}
    return named == set(article.split()) and article in text


def _answers_only(text: str, matter: str) -> bool:
    """Whether the reply answers the matter, and no other."""
    answered = {name for name, marks in ANSWER_MARKS.items() if _contains_any(text, marks)}
    return answered == {matter}


def _is_courteous(text: str) -> bool:
    """Whether the reply greets or thanks, and has nothing rude."""
    return _contains_any(text, COURTESY_MARKS) and not _contains_any(text, RUDE_MARKS)


def _contains_any(text: str, phrases: tuple[str, ...]) -> bool:
    """Whether one of the phrases occurs in the text."""
    return any(phrase in text for phrase in phrases)


def _words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def _pairs(words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Neighbouring words of a sentence, start and end included; all colours are alike, and all things."""
    kinds = ["COLOUR" if word in COLOURS else "THING" if word in THINGS else word for word in words]
    return pairwise(["START", *kinds, "END"])


@cache
def _known_pairs() -> frozenset[tuple[str, str]]:
    """Every pair of neighbouring words that the shop's sentences have."""
    answers = [sentence for forms in ANSWERS.values() for sentence in forms]
    named = [_fill(sentence, article) for sentence in answers for article in ("your red lamp", "it")]
    rude = [sentence[:-1] + ending for sentence in named for ending in RUDE_ENDINGS]
    fixed = [*OPENINGS, *CLOSINGS, *VAGUE_SENTENCES, *RUDE_SENTENCES]
    return frozenset(pair for sentence in (*named, *rude, *fixed) for pair in _pairs(tuple(_words(sentence))))
