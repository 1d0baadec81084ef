"""Generation beside learning: how far ahead it may run, what an update does to requests under way, and that
the same run gives the same parameters, also when it was killed in between."""

from __future__ import annotations

import json
import signal

import pytest

from rlhf_dist.experience.journal import JournalReader
from rlhf_dist.experience.steps import read_history

STEPS = 5
SLOW = (
    "rollout.num_workers=1",
    "rollout.max_num_seqs=1",
    "rollout.sampling.max_tokens=64",
    "rollout.sampling.min_tokens=32",
    "algorithm.num_epochs=1",
)
"""Generation takes longer than learning, so that every update finds a response under way."""


def overrides(lean, *more):
    changed = {each.partition("=")[0] for each in more}
    return [each for each in lean if each.partition("=")[0] not in changed] + list(more)


def history(run):
    return read_history(run.folder / "journal")


def samples(run):
    """(row of the journal, step that it was trained in) of every sample that was trained."""
    reader = JournalReader(run.folder / "journal")
    return [
        (row, step.step)
        for step in history(run).steps.values()
        for batch in reader.read_rows(step.samples)
        for row in batch.to_pylist()
    ]


@pytest.fixture(
    scope="module",
    params=["continue", *(pytest.param(each, marks=pytest.mark.long) for each in ("finish", "restart"))],
)
def ahead(request, train, lean):
    run = train(
        *overrides(
            lean,
            *SLOW,
            f"run.num_steps={STEPS}",
            f"run.deterministic={request.param == 'finish'}",
            "experience.max_staleness=2",
            f"rollout.on_update={request.param}",
            "algorithm.correction.kind=tis",
        )
    )
    assert run.returncode == 0, run.output
    return request.param, run


def test_no_token_is_older_than_allowed_and_some_are_old(ahead):
    _, run = ahead
    trained = samples(run)
    ages = [step - row["oldest_version"] for row, step in trained]
    assert max(ages) == max(metrics["staleness_max"] for metrics in run.metrics)
    assert 1 <= max(ages) <= 2
    for row, _ in trained:
        versions = [span["version"] for span in row["version_spans"]]
        assert row["oldest_version"] == min(versions)
        assert versions == sorted(versions), "weights only ever get newer"


def test_every_prompt_is_trained_once(ahead):
    _, run = ahead
    trained = sorted((row["ordinal"], row["sample"]) for row, _ in samples(run))
    config_prompts = run.metrics[0]["num_samples"]
    assert trained == [(ordinal, 0) for ordinal in range(STEPS * config_prompts)]


def test_prompts_are_consumed_in_order_where_the_run_is_deterministic(ahead):
    on_update, run = ahead
    ordinals = [ordinal for _, step in sorted(history(run).steps.items()) for ordinal in step.ordinals]
    assert sorted(ordinals) == list(range(len(ordinals)))
    if on_update == "finish":
        assert ordinals == sorted(ordinals)


def test_requests_under_way_do_what_was_asked_of_them(ahead):
    on_update, run = ahead
    spans = [len(row["version_spans"]) for row, _ in samples(run)]
    if on_update == "continue":
        assert max(spans) > 1, "some response has tokens of two versions"
    else:
        assert max(spans) == 1


def test_off_policy_samples_are_weighted_and_reported(ahead):
    _, run = ahead
    assert max(metrics["rollout_learner_kl"] for metrics in run.metrics[2:]) > 1e-6
    assert min(metrics["effective_sample_size"] for metrics in run.metrics[2:]) < 1
    assert all("correction_weight_mean" in metrics for metrics in run.metrics)


def test_every_version_is_proved_by_every_worker_before_it_is_served(ahead):
    _, run = ahead
    proofs = {(record["worker"], record["version"]) for record in history(run).served}
    num_workers = len({worker for worker, _ in proofs})
    assert {version for _, version in proofs} == set(range(STEPS + 1))
    assert len(proofs) == num_workers * (STEPS + 1)


# --------------------------------------------------------------------------------------- determinism

DETERMINISTIC = ("run.deterministic=true", f"run.num_steps={STEPS}", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def undisturbed(train, lean):
    run = train(*overrides(lean, *DETERMINISTIC))
    assert run.returncode == 0, run.output
    return run


def essence(run):
    """What must be the same: the policy after every step, and every metric but the times."""
    digests = {step.step: step.policy_digest for step in history(run).steps.values()}
    timed = ("seconds", "tokens_per_s")
    metrics = [
        {name: value for name, value in step.items() if not name.startswith(timed)} for step in run.metrics
    ]
    return digests, metrics


@pytest.mark.long
def test_a_second_run_killed_and_resumed_gives_the_same_parameters_bit_for_bit(
    undisturbed, start, train, lean
):
    command = start(*overrides(lean, *DETERMINISTIC))
    metrics = command.folder / "metrics.jsonl"
    command.wait_until(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, "the third step"
    )
    command.send(signal.SIGKILL)
    command.wait()
    resumed = train(*overrides(lean, *DETERMINISTIC), "--resume", folder=command.folder)
    assert resumed.returncode == 0, resumed.output
    assert essence(resumed) == essence(undisturbed)
    lines = (resumed.folder / "journal" / "steps.jsonl").read_text().splitlines()
    leased = [json.loads(line)["step"] for line in lines if json.loads(line)["event"] == "leased"]
    assert leased == list(range(STEPS)), "a step that was leased before the kill was not leased anew"
