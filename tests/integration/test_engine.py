"""A vLLM engine by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm


def test_a_sample_does_not_depend_on_its_neighbours_and_a_prompt_is_prefilled_once(tmp_path):
    """Bit for bit, with one thread: however requests come, and also where all are begun anew."""
    save_tiny_causal_lm(tmp_path / "policy", ["a few words"], seed=0, vocab_size=300, max_positions=512)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    share = RoleShare("rollout", 1, cpus=1, gpus=0, threads=1)
    script = Path(__file__).with_name("engine_alone.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "policy")],
        env=os.environ | share.environment | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    alone, anew, by_turns, num_cached = json.loads(run.stdout.splitlines()[-1])
    assert {len(tokens) for tokens, _ in alone} == {8}
    assert len({tuple(tokens) for tokens, _ in alone}) > len(alone) // 2
    assert [tokens for tokens, _ in anew] == [tokens for tokens, _ in alone]
    assert by_turns == alone
    assert num_cached == [0, 96, 96, 96], "of the 100 tokens of a prompt with four samples"
    assert list(temporary.glob("vllm_dist_*")) == []
