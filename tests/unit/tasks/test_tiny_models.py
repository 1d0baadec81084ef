"""Small models for tests and tasks: they load by path, in ordinary Hugging Face form."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.tasks.tiny_models import HEAD_DIM, save_tiny_causal_lm, save_tiny_reward_model

CORPUS = ["the cat sat on the mat", "the dog sat on the log"] * 3


def test_causal_lm_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    save_tiny_causal_lm(
        tmp_path, CORPUS, seed=0, vocab_size=270, hidden_size=64, num_layers=1, max_positions=40
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 1)
    assert model.config.hidden_size // model.config.num_attention_heads == HEAD_DIM
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 40
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 270


def test_tokenizer_encodes_any_text(tmp_path: Path) -> None:
    save_tiny_causal_lm(tmp_path, CORPUS, seed=0, hidden_size=32, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat sat", "h\u00e9llo \u65e5\u672c\n\n 123", "\U0001f600"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_reward_model_gives_one_score_a_sequence(tmp_path: Path) -> None:
    save_tiny_reward_model(tmp_path, CORPUS, seed=0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["the cat", "the dog sat on the log"], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits
    assert scores.shape == (2, 1)
    assert torch.isfinite(scores).all()
