"""`rlhf-dist bench ppo` on the real system, as small as it gets."""

from __future__ import annotations

import json

import pytest

from rlhf_dist.bench.inputs import make_inputs

pytestmark = pytest.mark.long
NUM_PROMPTS, MAX_TOKENS = 4, 8


@pytest.fixture(scope="module")
def results(tmp_path_factory, start):
    """One measured iteration after one that is not."""
    inputs = tmp_path_factory.mktemp("inputs")
    make_inputs(inputs, num_prompts=3, prompt_tokens=24)
    out = tmp_path_factory.mktemp("bench") / "results.json"
    command = start(
        str(inputs / "prompts.jsonl"),
        *("--prompts", str(NUM_PROMPTS), "--response-tokens", str(MAX_TOKENS), "--lengths", "ragged"),
        *("--epochs", "2", "--iterations", "1", "--warmup", "1", "--timeout-s", "300"),
        *("rollout.cpu_kv_cache_gib=0.1", "rollout.samples_per_batch=2"),
        config=inputs / "policy",
        folder=out,
        bench="ppo",
    )
    finished = command.wait()
    assert finished.returncode == 0, finished.output
    command.assert_nothing_left()
    return json.loads(out.read_text()), finished.output


def test_every_iteration_had_responses_of_the_given_lengths(results):
    results, _ = results
    lengths = results["work"]["response_tokens"]
    assert sorted(lengths) == [1, 2, 3, 5]
    assert [step["num_response_tokens"] for step in results["metrics"]] == [sum(lengths)] * 2
    assert {step["response_tokens_max"] for step in results["metrics"]} == {5}
    assert [len(tokens) for tokens in results["work"]["prompt_tokens"]] == [24] * 2 * NUM_PROMPTS


def test_whole_and_parts_were_measured_on_the_same_work(results):
    results, output = results
    assert {part: len(seconds) for part, seconds in results["bare_s"].items()} == {
        "generation": 2,
        "scoring": 2,
        "learning": 2,
    }
    assert len(results["loop_s"]) == 2
    summary = results["summary"]
    in_run_s = results["metrics"][1]["seconds_learning"]
    assert summary["loop_ratio"] == pytest.approx(in_run_s / results["loop_s"][1])
    first, second = (step["seconds_since_start"] for step in results["metrics"])
    assert summary["whole_s"] == pytest.approx(second - first)
    assert summary["parts_s"] == pytest.approx(sum(seconds[1] for seconds in results["bare_s"].values()))
    assert summary["ratio"] == pytest.approx(summary["parts_s"] / summary["whole_s"])
    assert summary["tokens_per_s"] == pytest.approx(11 / summary["whole_s"])
    assert "response tokens a second" in output
