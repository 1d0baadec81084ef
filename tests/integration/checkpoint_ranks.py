"""Learners that load, step and save, without Ray: `python checkpoint_ranks.py FOLDER RANK NUM_RANKS PORT`.

Standard input is a JSON list of cases, each with its ZeRO `stage`, its `dtype`, maybe its `algorithm` and
`lora`, and what to `do`: a number is a learner step, `{"load": FOLDER}`, `{"save": FOLDER}` and
`{"export": FOLDER}` are what they say, the latter two maybe with `file_bytes`, what a file can have at most.
For each case, a line `RESULT` with the metrics of its steps and what could not be written or loaded.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from learner_steps import OPTIMIZER, samples

from rlhf_dist.algorithms import make_algorithm, settings_class
from rlhf_dist.engines import training_state
from rlhf_dist.engines.collectives import join_group, leave_group
from rlhf_dist.engines.learner import Learner
from rlhf_dist.engines.loading import torch_dtype
from rlhf_dist.engines.settings import LearnerSettings, OptimizerSettings, ValueOptimizerSettings
from rlhf_dist.errors import StorageError
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm

NUM_STEPS = 4
WRITES = {"save": Learner.save, "export": Learner.export_policy}


def make_learner(case: dict[str, Any], model: Path, num_ranks: int) -> Learner:
    section = case.get("algorithm", {"name": "ppo"})
    algorithm = make_algorithm(settings_class(section["name"]).model_validate(section))
    schedule = {"schedule": "cosine", "warmup_steps": 3}
    settings = LearnerSettings(
        num_workers=num_ranks,
        zero_stage=case["stage"],
        max_tokens_per_micro_batch=20,
        policy_optimizer=OptimizerSettings(**OPTIMIZER, **schedule),
        value_optimizer=ValueOptimizerSettings(**OPTIMIZER, **schedule),
        lora=case.get("lora"),
    )
    return Learner(
        settings,
        algorithm,
        policy_model=str(model),
        value_model=str(model),
        num_steps=NUM_STEPS,
        dtype=torch_dtype(case["dtype"], on_gpu=False),
        seed=0,
    )


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process gets larger, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def do(case: dict[str, Any], model: Path, num_ranks: int) -> dict[str, Any]:
    metrics: list[dict[str, float]] = []
    errors: list[str] = []
    learner = make_learner(case, model, num_ranks)
    for action in case["do"]:
        try:
            if isinstance(action, int):
                metrics.append(learner.step(samples(action), step=action, temperature=1.0))
            elif "load" in action:
                learner.load(Path(action["load"]))
            else:
                ((write, folder),) = [(each, Path(action[each])) for each in WRITES if each in action]
                folder.mkdir(exist_ok=True)
                with largest_file(action.get("file_bytes", resource.RLIM_INFINITY)):
                    WRITES[write](learner, folder)
        except StorageError as error:
            errors.append(str(error))
        dist.barrier()
    return {"metrics": metrics, "errors": errors}


def main(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    training_state.BUCKET_ELEMENTS = 5_000  # several buckets, some of which cut a parameter
    model = folder / f"model-{num_ranks}-{rank}"
    save_tiny_causal_lm(model, ["a few words"], seed=0, hidden_size=32, num_layers=1)
    join_group("127.0.0.1", port, rank=rank, num_ranks=num_ranks, on_gpu=False, timeout_s=60)
    for case in json.load(sys.stdin):
        print("RESULT" + json.dumps(do(case, model, num_ranks)), flush=True)
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
