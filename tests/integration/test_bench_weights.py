"""The bench of weights measures real workers, and what it writes adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.long
def test_two_workers_are_measured_and_the_parts_are_within_the_whole(tmp_path):
    out = tmp_path / "weights.json"
    arguments = ["--sizes-mb", "1", "--workers", "2", "--rounds", "2", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "rlhf_dist", "bench", "weights", *arguments],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    (case,) = json.loads(out.read_text())
    assert case["num_workers"] == 2
    assert 0.8e6 < case["num_bytes"] < 1.4e6
    assert len(case["rounds"]) == 2
    for each in case["rounds"]:
        assert min(each.values()) > 0
        assert each["learner_write_s"] + each["learner_probe_s"] + each["load_s"] < each["total_s"]
    assert "New weights" in run.stdout
