"""A vLLM engine by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm


def test_more_prompt_tokens_than_a_step_takes_are_generated_from_all_the_same(tmp_path):
    """Each request's seed decides its response, also where it is begun anew with the others."""
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
    alone, anew = json.loads(run.stdout.splitlines()[-1])
    assert {len(tokens) for tokens in alone} == {8}
    assert len(set(map(tuple, alone))) > len(alone) // 2
    assert anew == alone
    assert list(temporary.glob("vllm_dist_*")) == []
