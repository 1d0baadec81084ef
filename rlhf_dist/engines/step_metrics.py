"""What a step's batch says of the policy that sampled it: rewards, lengths, KL, entropy, engine mismatch."""

from __future__ import annotations

import torch

from rlhf_dist.algorithms.base import StepBatch
from rlhf_dist.experience.samples import Samples
from rlhf_dist.ops.kl import kl_estimate
from rlhf_dist.ops.losses import mismatch_stats
from rlhf_dist.ops.masked import masked_mean


def sample_metrics(samples: Samples) -> dict[str, float]:
    """Over samples: rewards and their parts, response lengths in tokens, share that ended by itself."""
    lengths = samples.response_lengths
    metrics = {
        "reward_mean": float(samples.rewards.mean()),
        "reward_std": float(samples.rewards.std()),
        "reward_min": float(samples.rewards.min()),
        "reward_max": float(samples.rewards.max()),
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_max": float(lengths.max()),
        "finished_share": float(samples.finished.mean()),
        "num_samples": samples.num_samples,
        "num_response_tokens": samples.num_response_tokens,
        "oldest_policy_version": int(samples.oldest_versions.min()),
    }
    if len(samples.reward_parts) > 1:
        metrics |= {f"reward_part_{name}": float(part.mean()) for name, part in samples.reward_parts.items()}
    return metrics


def token_metrics(batch: StepBatch, entropies: torch.Tensor) -> dict[str, float]:
    """Over tokens: entropy, KL to the reference, and the gap between the sampling engine and the learner.

    `kl_ref` is the k1 estimate in nats a token (`kl_ref_k3` the other one, never negative, but carried by
    few tokens), `kl_ref_response` its sum over a response. `rollout_learner_kl` is the k3 estimate of
    KL(sampler || learner), `_k1` its k1 estimate; `effective_sample_size` is the share of the tokens that the
    batch would be worth if it were weighted to be the learner's.
    """
    mask = batch.mask
    mismatch = mismatch_stats(batch.old_logprobs, batch.rollout_logprobs, mask)
    metrics = {
        "entropy": float(masked_mean(entropies, mask)),
        "rollout_learner_gap_max": float(mismatch["abs_max"]),
        "rollout_learner_kl": float(mismatch["kl_k3"]),
        "rollout_learner_kl_k1": float(mismatch["kl"]),
        "effective_sample_size": float(mismatch["ess"]),
    }
    if batch.ref_logprobs is not None:
        k1 = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1")
        k3 = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k3")
        metrics["kl_ref"] = float(masked_mean(k1, mask))
        metrics["kl_ref_k3"] = float(masked_mean(k3, mask))
        metrics["kl_ref_response"] = float(torch.where(mask, k1, 0.0).sum(dim=1).mean())
    return metrics
