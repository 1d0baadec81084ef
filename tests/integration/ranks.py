"""Processes that are the ranks of one group, without Ray: what a script of this folder says of each case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.placement import RoleShare
from rlhf_dist.cluster.process_group import free_port

DEADLINE_S = 500
ENVIRONMENT = RoleShare("learner", 1, cpus=1, gpus=0, threads=1).environment | {"PYTHONFAULTHANDLER": "1"}


def run_ranks(script: str, num_ranks: int, folder: Path, cases: Sequence[Any]) -> list[list[Any]]:
    """By rank, the JSON after `RESULT` of each case.

    Args:
        script: called with the folder, the rank, the number of ranks and a port, and the cases on its input.
        folder: for whatever the ranks write.
    """
    port = free_port()
    (folder / "cases").write_text(json.dumps(cases))
    outputs = [folder / f"output-{num_ranks}-{rank}" for rank in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, (Path(__file__).with_name(script), folder, rank, num_ranks, port))],
            stdin=(folder / "cases").open(),
            stdout=outputs[rank].open("w"),
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
        )
        for rank in range(num_ranks)
    ]
    try:
        _wait_until_ended(ranks, outputs)
    finally:
        for process in ranks:
            process.kill()
    lines = [output.read_text().splitlines() for output in outputs]
    return [
        [json.loads(line.removeprefix("RESULT")) for line in rank if line.startswith("RESULT")]
        for rank in lines
    ]


def _wait_until_ended(ranks: Sequence[subprocess.Popen], outputs: Sequence[Path]) -> None:
    """Until every rank has ended well; one that did not says how, with its last words."""
    deadline = time.monotonic() + DEADLINE_S
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    last_words = "\n".join(f"-- {output.name}: {output.read_text()[-3000:]}" for output in outputs)
    assert codes == [0] * len(ranks), f"exit codes {codes} after at most {DEADLINE_S} s\n{last_words}"
