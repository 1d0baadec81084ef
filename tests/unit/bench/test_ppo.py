"""The work of the bench: what is run, and that a person's overrides count."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from rlhf_dist.bench import inputs as inputs_module
from rlhf_dist.bench import ppo
from rlhf_dist.bench.inputs import make_inputs
from rlhf_dist.driver.preparation import prepare
from rlhf_dist.errors import ConfigError, StorageError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    num_parameters = make_inputs(folder, num_prompts=3, prompt_tokens=24)
    return folder, num_parameters


@pytest.fixture
def make(tmp_path, inputs):
    """Two iterations of four prompts, from a file of three."""

    def make(*overrides, lengths="ragged"):
        return ppo.make_work(
            str(inputs[0] / "policy"),
            str(inputs[0] / "prompts.jsonl"),
            overrides,
            folder=tmp_path,
            lengths=lengths,
            response_tokens=30,
            prompts_per_step=4,
            num_epochs=4,
            num_iterations=1,
            num_warmup=1,
        )

    return make


def test_the_inputs_are_as_large_and_as_long_as_they_say(inputs):
    folder, num_parameters = inputs
    assert 2.95e6 < num_parameters < 3.05e6
    assert len((folder / "prompts.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ConfigError, match="is not empty; name a new folder"):
        make_inputs(folder, num_prompts=3, prompt_tokens=24)


def test_a_policy_has_the_size_that_was_asked_for(tmp_path):
    num_parameters = make_inputs(
        tmp_path, num_prompts=1, prompt_tokens=24, hidden_size=1024, num_layers=1, vocab_size=3000
    )
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"]) == (1024, 8)
    assert config["vocab_size"] == 3000
    layer = 4 * 1024**2 + 3 * 1024 + 9 * 1024**2 + 2 * 1024
    assert num_parameters == 3000 * 1024 + layer + 1024


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"hidden_size": 100}, "no model is 100 wide: attention heads are 32 wide there; name a multiple"),
        ({"hidden_size": 1056}, "no model is 1056 wide: attention heads are 128 wide there"),
        ({"vocab_size": 3_000_000}, "a vocabulary of 3,000,000 tokens is too large; 2,205,225 is the most"),
    ],
)
def test_a_size_that_no_policy_has_is_refused(size, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_inputs(tmp_path / "new", num_prompts=1, prompt_tokens=24, **size)
    assert list(tmp_path.iterdir()) == []


def test_a_length_below_the_templates_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no prompt has 5 tokens"):
        make_inputs(tmp_path / "new", num_prompts=1, prompt_tokens=5)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_inputs_is_refused(tmp_path):
    file = tmp_path / "inputs"
    file.touch()
    with pytest.raises(
        ConfigError, match=r"inputs is no empty folder \(Not a directory\); name a new folder"
    ):
        make_inputs(file, num_prompts=1, prompt_tokens=24)
    with pytest.raises(
        StorageError, match=r"below cannot be written \(.*Not a directory.*\); make room there"
    ):
        make_inputs(file / "below", num_prompts=1, prompt_tokens=24)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(OSError("No space left on device"), StorageError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_inputs_that_are_not_whole_are_not_left(failure, raised, tmp_path, monkeypatch):
    def fail(path, _):
        assert (path.parent / "policy" / "config.json").exists()
        raise failure

    monkeypatch.setattr(inputs_module, "write_atomically", fail)
    with pytest.raises(raised):
        make_inputs(tmp_path, num_prompts=1, prompt_tokens=24)
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_as_long_to_the_tokenizer_on_disk(inputs):
    folder, _ = inputs
    length = inputs_module._length(AutoTokenizer.from_pretrained(folder / "policy"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [length(prompt) for prompt in prompts] == [24] * 3


def test_every_ordinal_has_a_row_with_the_length_of_its_response(make, tmp_path):
    work = make("run.seed=2")
    config = ppo._with_lengths(work, tmp_path)
    prepared = prepare(config, config.policy.model)
    table = prepared.prompts.table
    assert sorted(work.response_tokens) == [2, 6, 12, 19]
    assert table["max_response_tokens"].to_pylist() == work.response_tokens * 2
    assert {len(tokens) for tokens in table["prompt_tokens"].to_pylist()} == {24}
    assert table["prompt"][0] == table["prompt"][3] != table["prompt"][1], "three prompts, over and over"
    assert config.rollout.sampling.min_tokens == config.rollout.sampling.max_tokens == 30
    json.dumps(config.model_dump(mode="json"))


def test_the_bare_engine_gets_the_requests_of_the_run(make, tmp_path):
    work = make("rollout.samples_per_prompt=2")
    config = ppo._with_lengths(work, tmp_path)
    first, second = ppo._requests(work, config, prepare(config, config.policy.model))
    assert [each.request.ordinal for each in second] == [4, 4, 5, 5, 6, 6, 7, 7]
    assert [each.num_tokens for each in first] == [n for n in work.response_tokens for _ in range(2)]
    assert len({each.request.seed for each in first + second}) == 16


def test_overrides_have_the_last_word(make):
    work = make("rollout.sampling.max_tokens=8", "algorithm.num_epochs=1", lengths="uniform")
    assert work.response_tokens == [8, 8, 8, 8]
    assert work.config.algorithm.num_epochs == 1
