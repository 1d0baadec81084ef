"""Learner steps of a rank, without Ray and vLLM: `python learner_steps.py FOLDER RANK NUM_RANKS PORT`.

Standard input is a JSON list of algorithm sections. For each, a line `RESULT`, the metrics of two steps,
and those of a third step by the same learner and by a new one that has loaded its checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rlhf_dist.algorithms import make_algorithm, settings_class
from rlhf_dist.algorithms.base import AlgorithmSettings
from rlhf_dist.engines.collectives import join_group
from rlhf_dist.engines.learner import Learner
from rlhf_dist.engines.settings import LearnerSettings, OptimizerSettings, ValueOptimizerSettings
from rlhf_dist.experience.samples import Samples
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm

LENGTHS = np.array([3, 5, 1, 4, 6, 2, 5, 5])
PROMPT_TOKENS = 4


def samples(seed: int) -> Samples:
    """Eight responses to two prompts, with a gap between the sampler and the learner."""
    random = np.random.default_rng(seed)
    num_tokens, count = int(LENGTHS.sum()), len(LENGTHS)
    return Samples(
        prompt_tokens=random.integers(5, 200, count * PROMPT_TOKENS).astype(np.int32),
        prompt_offsets=np.arange(count + 1) * PROMPT_TOKENS,
        response_tokens=random.integers(5, 200, num_tokens).astype(np.int32),
        response_offsets=np.concatenate([[0], np.cumsum(LENGTHS)]),
        response_mask=np.ones(num_tokens, np.uint8),
        rollout_logprobs=random.normal(-6, 0.5, num_tokens).astype(np.float32),
        policy_versions=np.zeros(num_tokens, np.int32),
        ref_logprobs=random.normal(-6, 0.5, num_tokens).astype(np.float32),
        rewards=random.normal(0, 1, count),
        ordinals=np.repeat([0, 1], count // 2),
        finished=np.ones(count, bool),
        reward_parts={},
    )


def learner(model: Path, settings: AlgorithmSettings, *, num_ranks: int) -> Learner:
    """Cut small where there are several ranks: ragged micro-batches, ZeRO-2."""
    algorithm = make_algorithm(settings)
    return Learner(
        LearnerSettings(
            num_workers=num_ranks,
            zero_stage=0 if num_ranks == 1 else 2,
            max_tokens_per_micro_batch=8192 if num_ranks == 1 else 20,
            policy_optimizer=OptimizerSettings(learning_rate=3e-3),
            value_optimizer=ValueOptimizerSettings(learning_rate=3e-3),
        ),
        algorithm,
        policy_model=str(model),
        value_model=str(model) if algorithm.needs.value_model else None,
        num_steps=3,
        dtype=torch.float32,
        seed=0,
    )


def main(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    model = folder / f"model-{rank}"
    save_tiny_causal_lm(model, ["a few words"], seed=0, hidden_size=32, num_layers=1)
    join_group("127.0.0.1", port, rank=rank, num_ranks=num_ranks, on_gpu=False, timeout_s=60)
    for number, case in enumerate(json.load(sys.stdin)):
        settings = settings_class(case["name"]).model_validate(case)
        checkpoint = folder / f"checkpoint-{number}"
        checkpoint.mkdir(exist_ok=True)
        first = learner(model, settings, num_ranks=num_ranks)
        metrics = [first.step(samples(step), step=step, temperature=1.0) for step in range(2)]
        first.save(checkpoint)
        dist.barrier()
        second = learner(model, settings, num_ranks=num_ranks)
        second.load(checkpoint)
        resumed = [each.step(samples(2), step=2, temperature=1.0) for each in (first, second)]
        print("RESULT" + json.dumps({"steps": metrics, "resumed": resumed}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
