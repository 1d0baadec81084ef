"""The driver holds references and counts: no tensor and no experience passes through its process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LARGEST_ANSWER_BYTES = 64 * 1024


def test_no_tensor_passes_through_the_driver(recorded):
    seen = json.loads(recorded.seen_by_driver.read_text())
    policy_bytes = (recorded.run.folder / "policy" / "model.safetensors").stat().st_size
    assert policy_bytes > 10 * LARGEST_ANSWER_BYTES, "a snapshot would not go unnoticed"
    assert len(seen) > 4 * 10, "the spy saw every answer of four steps"
    assert [entry for entry in seen if entry["payloads"]] == []
    assert max(entry["bytes"] for entry in seen) < LARGEST_ANSWER_BYTES


def test_the_spy_would_see_a_tensor(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import numpy as np, ray
from driver_spy import spy
spy(Path({str(tmp_path / "seen.json")!r}))
ray.init(address="local", num_cpus=1, include_dashboard=False)
ray.get(ray.put({{"weights": [np.zeros(100_000)]}}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
    (entry,) = json.loads((tmp_path / "seen.json").read_text())
    assert entry["payloads"] == ["ndarray"]
    assert entry["bytes"] >= 800_000
