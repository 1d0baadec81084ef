"""`rlhf-dist bench queue` on the real queue, as small as it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_everything_is_measured_with_producers_that_wait_for_the_reader(tmp_path):
    out = tmp_path / "queue.json"
    sizes = ["--producers", "2", "--seconds", "1", "--samples-per-batch", "4", "--response-tokens", "8"]
    run = subprocess.run(
        [sys.executable, "-m", "rlhf_dist", "bench", "queue", *sizes, "--soak-minutes", "0.02", "--out", out],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())
    assert [case["num_producers"] for case in results["cases"]] == [2]
    for case in [*results["cases"], results["soak"]]:
        window, speeds = case["window"], case["speeds"]
        assert window["num_samples"] > 0
        assert window["num_samples"] % (8 * 4) == 0, "whole steps"
        assert case["samples_per_s"] * window["seconds"] == pytest.approx(window["num_samples"])
        assert 0 < speeds["read"] < speeds["memcpy"]
        assert case["read_to_memcpy"] == speeds["read"] / speeds["memcpy"]
        assert len(window["memory"]) == 2
        assert all(each["queue"] > 2**20 and each["driver"] > 2**20 for each in window["memory"])
    assert "2 producers for 0 min" in run.stdout
