"""`rlhf-dist bench pipeline` on the real system, as small as it gets."""

from __future__ import annotations

import json

import pytest

from rlhf_dist.tasks.support_desk import make_policy

pytestmark = pytest.mark.long
SMALL = (
    *("sft=null", "run.num_sample_answers=0", "rollout.prompts_per_step=8", "rollout.num_workers=1"),
    *("rollout.cpu_kv_cache_gib=0.1", "rollout.sampling.max_tokens=8", "learner.num_workers=1"),
    *("learner.zero_stage=0", "algorithm.num_epochs=1", "checkpoint.every_steps=100"),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, start):
    """Four steps each, of which two count."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_policy(folder / "policy", seed=0)
    command = start(
        *SMALL,
        *(f"policy.model={folder / 'policy'}", "--steps", "4"),
        folder=folder / "pipeline.json",
        bench="pipeline",
    )
    finished = command.wait()
    assert finished.returncode == 0, finished.output
    command.assert_nothing_left()
    return json.loads(finished.folder.read_text())["runs"], finished.output


def test_one_run_takes_turns_and_the_other_does_not(measured):
    runs, output = measured
    assert max(step["staleness_max"] for step in runs["by turns"]["metrics"]) == 0
    assert max(step["staleness_max"] for step in runs["side by side"]["metrics"]) == 1
    assert "learner waits, share of the step" in output


def test_what_is_worked_out_is_of_the_steps_that_count(measured):
    runs, _ = measured
    for run in runs.values():
        steps = run["metrics"]
        assert len(steps) == 4
        assert run["num_steps"] == 2
        first, last = steps[1]["seconds_since_start"], steps[3]["seconds_since_start"]
        assert run["wall_s"] == pytest.approx((last - first) / 2)
        waiting = steps[2]["seconds_waiting"] + steps[3]["seconds_waiting"]
        assert run["bubble"] == pytest.approx(waiting / (last - first))
        assert 0 < run["driver_cpu_share"] < 1
        assert 0 < run["queue_cpu_share"] < 1
