"""Learner steps of a rank, without Ray and vLLM: `python learner_steps.py FOLDER RANK NUM_RANKS PORT`.

Standard input is a JSON list of algorithm sections, some with the learner's `lora` among their keys. For
each, a line `RESULT`: the metrics of two steps and the file of the parameters after them; with one rank, also
the metrics of a third step by the same learner and by a new one that has loaded its checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from rlhf_dist.algorithms import make_algorithm, settings_class
from rlhf_dist.algorithms.base import AlgorithmSettings
from rlhf_dist.engines.collectives import join_group, leave_group
from rlhf_dist.engines.learner import Learner
from rlhf_dist.engines.settings import (
    LearnerSettings,
    LoRASettings,
    OptimizerSettings,
    ValueOptimizerSettings,
)
from rlhf_dist.experience.samples import Samples
from rlhf_dist.tasks.tiny_models import save_tiny_causal_lm

PROMPT_LENGTHS = np.array([4, 2, 3, 2, 3, 2, 3, 2])
RESPONSE_LENGTHS = np.array([[40, 5, 1, 3, 6, 2, 5, 3], [3, 5, 1, 4, 6, 2, 5, 5]])
MAX_TOKENS = 24
"""Two ranks cut even steps into three micro-batches of 1, 3 and 4 samples, so that one rank is idle once, and
odd steps into four."""
ALL_MASKED, MASKED_SHARE = 6, 0.25
OPTIMIZER = {"learning_rate": 3e-3, "eps": 1e-2, "max_grad_norm": 1e3}
"""A large eps keeps Adam from turning the rounding of a tiny gradient into a whole step, and a bound that no
gradient reaches keeps clipping from hiding a wrong scale."""


def samples(step: int) -> Samples:
    """Eight responses to two prompts, with a gap between the sampler and the learner.

    A share of the tokens is an environment's, and one response has no others. No policy chose them, and where
    their log-probabilities belong is NaN.
    """
    random = np.random.default_rng(step)
    lengths = RESPONSE_LENGTHS[step % 2]
    prompt_offsets, offsets = (np.concatenate([[0], np.cumsum(each)]) for each in (PROMPT_LENGTHS, lengths))
    num_tokens, count = int(lengths.sum()), len(lengths)
    mask = random.random(num_tokens) > MASKED_SHARE
    mask[offsets[:-1]] = True
    mask[offsets[ALL_MASKED] : offsets[ALL_MASKED + 1]] = False
    rollout_logprobs, ref_logprobs = (
        np.where(mask, random.normal(-6, 0.5, num_tokens), np.nan).astype(np.float32) for _ in range(2)
    )
    return Samples(
        prompt_tokens=random.integers(5, 200, int(PROMPT_LENGTHS.sum())).astype(np.int32),
        prompt_starts=prompt_offsets[:-1],
        prompt_lengths=PROMPT_LENGTHS,
        response_tokens=random.integers(5, 200, num_tokens).astype(np.int32),
        response_starts=offsets[:-1],
        response_lengths=lengths,
        response_mask=mask.astype(np.uint8),
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
        oldest_versions=np.zeros(count, np.int32),
        rewards=random.normal(0, 1, count),
        ordinals=np.repeat([0, 1], count // 2),
        finished=np.ones(count, bool),
        reward_parts={},
    )


def learner(
    model: Path, settings: AlgorithmSettings, lora: LoRASettings | None, *, num_ranks: int
) -> Learner:
    """Cut small where there are several ranks: ragged micro-batches, ZeRO-2 where the algorithm can."""
    algorithm = make_algorithm(settings)
    whole = num_ranks == 1 or algorithm.needs.trust_region is not None
    return Learner(
        LearnerSettings(
            num_workers=num_ranks,
            zero_stage=0 if whole else 2,
            max_tokens_per_micro_batch=8192 if num_ranks == 1 else MAX_TOKENS,
            policy_optimizer=OptimizerSettings(**OPTIMIZER),
            value_optimizer=ValueOptimizerSettings(**OPTIMIZER),
            lora=lora,
        ),
        algorithm,
        policy_model=str(model),
        value_model=str(model) if algorithm.needs.value_model else None,
        num_steps=3,
        dtype=torch.float32,
        seed=0,
    )


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    """Of the policy and, if there is one, the value model; without ZeRO-3 they are whole on every rank."""
    return {
        f"{name}.{parameter}": tensor.detach().clone()
        for name, engine in learner._engines()
        for parameter, tensor in engine.module.named_parameters()
    }


def main(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    model = folder / f"model-{rank}"
    save_tiny_causal_lm(model, ["a few words"], seed=0, hidden_size=32, num_layers=1)
    join_group("127.0.0.1", port, rank=rank, num_ranks=num_ranks, on_gpu=False, timeout_s=60)
    for number, case in enumerate(json.load(sys.stdin)):
        trained = folder / f"parameters-{number}-{rank}.pt"
        lora = LoRASettings.model_validate(case.pop("lora")) if "lora" in case else None
        settings = settings_class(case["name"]).model_validate(case)
        first = learner(model, settings, lora, num_ranks=num_ranks)
        start = parameters(first)
        metrics = [first.step(samples(step), step=step, temperature=1.0) for step in range(2)]
        torch.save({"start": start, "trained": parameters(first)}, trained)
        result = {"steps": metrics, "parameters": str(trained)}
        if num_ranks == 1:
            checkpoint = folder / f"checkpoint-{number}"
            checkpoint.mkdir()
            first.save(checkpoint)
            second = learner(model, settings, lora, num_ranks=num_ranks)
            second.load(checkpoint)
            result["resumed"] = [each.step(samples(2), step=2, temperature=1.0) for each in (first, second)]
        print("RESULT" + json.dumps(result), flush=True)
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
