"""Every case of the reference numbers: what other codebases compute on the same inputs.

An adapter a function states our numbers in the convention of the peer that made the case: it changes the
inputs or the result of our function, never the peer's numbers, and says why. Per-token outputs are compared
at valid tokens. Where a peer has NaN or raises, ours must be finite.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_dist.algorithms.parts.kl import KLPenalty, KLSettings
from rlhf_dist.ops.kl import AdaptiveKLController, kl_estimate
from rlhf_dist.ops.logprobs import entropy_from_logits, logprobs_and_entropy, logprobs_from_logits
from rlhf_dist.ops.losses import (
    aggregate,
    effective_sample_size,
    importance_weights,
    mismatch_stats,
    policy_loss,
    rejection_mask,
    sequence_policy_loss,
    value_loss,
)
from rlhf_dist.ops.masked import keep, masked_mean, masked_whiten
from rlhf_dist.ops.returns import discounted_returns, gae, group_advantages, shape_rewards

CASES_DIR = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "public"
CASE_IDS = sorted(path.stem for path in CASES_DIR.glob("*.npz"))
ABSENT = "the reference numbers are not beside this checkout"

NOT_COVERED = {
    "group_advantages__verl__gpg_": "GPG's rescaling by the share of non-zero scores",
    "group_advantages__verl__grpo_passk_": "pass@k advantages: only the best answer counts",
    "group_advantages__verl__opo_": "a length-weighted baseline",
    "policy_loss__verl__cispo_": "the CISPO objective",
    "policy_loss__verl__dppo_tv_": "the DPPO objective",
    "policy_loss__verl__geo_mean_": "the GMPO objective",
    "policy_loss__verl__sapo_": "the SAPO objective",
}
"""Prefix of the case ids: the objective that `ops` does not have."""

OUTPUTS_NOT_OURS = {
    "group_advantages": {"group_std"},
    "rollout_correction": {
        "metric_is_max", "metric_is_min", "metric_is_std", "metric_is_frac_high", "metric_is_frac_low",
        "metric_is_frac_dropped", "metric_is_norm_factor", "metric_rs_token_frac", "metric_rs_seq_frac",
        "metric_train_ppl", "metric_train_log_ppl", "metric_rollout_ppl", "metric_rollout_log_ppl",
        "metric_log_ppl_diff", "metric_log_ppl_abs_diff", "metric_ppl_ratio", "metric_chi2_seq",
    },
    "whiten": {"var"},
}  # fmt: skip
"""Intermediate results and monitoring numbers of the peers that `ops` does not return."""

EPS_COUNT = 1e-8
"""verl's masked means, and OpenRLHF's of a row, divide by count + 1e-8 where `ops` divides by the count."""


@dataclass
class Case:
    """One file: what went into the peer's function and what came out."""

    meta: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @classmethod
    def load(cls, case_id: str) -> Case:
        with np.load(CASES_DIR / f"{case_id}.npz") as file:
            return cls(
                json.loads(str(file["meta"])),
                {name[3:]: file[name] for name in file.files if name.startswith("in_")},
                {name[4:]: file[name] for name in file.files if name.startswith("out_")},
            )

    @property
    def peer(self) -> str:
        return self.meta["peer"]

    @property
    def params(self) -> dict[str, Any]:
        return self.meta["params"]

    def __getitem__(self, name: str) -> Tensor:
        """An input: floating tensors in the dtype the peer worked in."""
        tensor = torch.from_numpy(self.inputs[name])
        return tensor.to(getattr(torch, self.meta["dtype"])) if tensor.is_floating_point() else tensor

    @cached_property
    def mask(self) -> Tensor:
        return self["mask"]

    @cached_property
    def valid(self) -> Tensor:
        return self.mask != 0

    @cached_property
    def seen(self) -> Tensor:
        """TRL's second mask: one column more than the response, if there is one."""
        columns = torch.arange(self.mask.shape[1])
        return columns <= self["last_index"].unsqueeze(-1) + 1


@dataclass
class Ours:
    """Our numbers under the peer's names, and where and how closely to compare them."""

    outputs: dict[str, Tensor | float]
    valid: Tensor | None = None
    rtol: dict[str, float] = field(default_factory=dict)
    atol: dict[str, float] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)


def grad(scalar: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, x)[0]


def mean_over(x: Tensor, mask: Tensor, peer: str) -> Tensor:
    """The peer's masked mean, from ours."""
    return verl_mean(masked_mean(x, mask), mask) if peer == "verl" else masked_mean(x, mask)


def verl_mean(mean: Tensor, mask: Tensor) -> Tensor:
    count = (mask != 0).sum().double()
    return mean * count / (count + EPS_COUNT)


def row_factor(case: Case) -> Tensor:
    """What a row is multiplied by for the peers' row means: [B, 1]."""
    lengths = case.valid.sum(-1, keepdim=True).to(getattr(torch, case.meta["dtype"]))
    return lengths / (lengths + EPS_COUNT)


def loss_weights(case: Case) -> Tensor:
    """The case's importance weights, times the row factor where the loss takes row means: [B, T]."""
    weights = case["is_weights"] if "is_weights" in case.inputs else torch.ones_like(case["advantages"])
    return weights * row_factor(case) if case.params["agg_mode"] == "seq-mean-token-mean" else weights


# ---------------------------------------------------------------------------------------------- adapters


def check_logprob_entropy(case: Case) -> Ours:
    logits = case["logits"]
    if "labels" not in case.inputs:
        return Ours({"entropy": entropy_from_logits(logits)})
    labels = case["labels"]
    tau = case.params.get("temperature_used", case.params["temperature"])  # verl: rounded to float32
    if case.peer == "trl":
        tau += 1e-7  # added by the peer
    logprobs = logprobs_from_logits(logits, labels, tau)
    entropy = entropy_from_logits(logits, 1.0 if case.peer == "openrlhf" else tau)  # OpenRLHF: not tempered
    joint_logprobs, joint_entropy = logprobs_and_entropy(logits, labels, tau)
    assert torch.equal(joint_logprobs, logprobs)
    assert torch.equal(joint_entropy, entropy_from_logits(logits, tau))
    assert torch.isfinite(entropy).all()  # also with a logit of -inf
    return Ours({"logprobs": logprobs, "entropy": entropy})


def estimator(case: Case) -> str:
    names = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
    name = case.params["estimator"].removesuffix("+")
    return names.get(name, name)


def peers_kl(case: Case, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    kl = kl_estimate(logprobs, ref_logprobs, estimator(case))
    if case.peer == "openrlhf" or (case.peer == "verl" and estimator(case) == "k3"):
        return kl.clamp(-10, 10)  # these peers clamp the result as well
    return kl


def check_kl_estimators(case: Case) -> Ours:
    logprobs, ref_logprobs = case["logprobs"].requires_grad_(), case["ref_logprobs"]
    kl = peers_kl(case, logprobs, ref_logprobs)
    if case.params["estimator"].endswith("+"):  # verl: this value with the gradient of k2
        k2 = kl_estimate(logprobs, ref_logprobs, "k2")
        kl = kl.detach() + k2 - k2.detach()
    within = torch.ones_like(kl, dtype=torch.bool)
    if case.peer == "trl" and estimator(case) == "k3":  # TRL does not clamp the log-ratio
        within = (logprobs - ref_logprobs).detach().abs() <= 20
    return Ours({"kl": kl, "grad_logprobs": grad(kl.sum(), logprobs)}, valid=within)


def check_reward_shaping(case: Case) -> Ours:
    scores, mask, valid = case["scores"], case.mask, case.valid
    beta = max(case.params["beta"], 0.0)  # OpenRLHF: a negative coefficient counts as 0
    if case.params.get("reward_clip_range"):
        scores = scores.clamp(*case.params["reward_clip_range"])
    kl = case["kl"] if "kl" in case.inputs else peers_kl(case, case["logprobs"], case["ref_logprobs"])
    if case.peer == "trl":  # the score lands one column after the response; no KL there
        rewards = shape_rewards(scores, keep(kl, valid), case.seen, beta)
        if case.params["whiten_rewards"]:
            rewards = masked_whiten(rewards, case.seen, shift_mean=False)
        return Ours({"token_level_rewards": rewards, "kl": keep(kl, valid)}, valid=case.seen)
    rewards = shape_rewards(scores, kl, mask, beta)
    if case.peer == "openrlhf":
        return Ours({"token_level_rewards": rewards, "kl": kl})
    mean_kl = aggregate(kl * row_factor(case), mask, kind="seq_mean_token_mean", num_sequences=len(mask))
    controller = AdaptiveKLController(beta, *(case.params["adaptive_target_horizon"] or (1.0, float("inf"))))
    controller.update(mean_kl.item(), len(mask))
    return Ours(
        {
            "token_level_rewards": rewards,
            "token_level_scores": shape_rewards(scores, kl, mask, 0.0),
            "mean_kl": mean_kl,
            "coef_after": controller.coef,
        }
    )


def check_gae(case: Case) -> Ours:
    gamma, lam = case.params["gamma"], case.params["lam"]
    values, mask, valid = case["values"], case.mask, case.valid
    if case.peer == "trl":  # a score and a value one column after the response take part
        if "rewards" in case.inputs:
            rewards = case["rewards"]
        else:
            kl = keep(kl_estimate(case["logprobs"], case["ref_logprobs"], "k1"), valid)
            rewards = shape_rewards(case["scores"], kl, case.seen, case.params["beta"])
        advantages, returns = gae(rewards, values, case.seen, gamma=gamma, lam=lam)
        return Ours(
            {
                "advantages_raw": advantages,
                "returns": returns,
                "rewards": rewards,
                "values_used": keep(values, case.seen),
                "advantages_whitened": masked_whiten(advantages, valid),
            },
            valid=case.seen,
        )
    rewards = case["rewards"]
    if case.peer == "openrlhf":
        advantages, returns = openrlhf_gae(rewards, values, case, gamma, lam)
    else:
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    return Ours(
        {
            "advantages_raw": advantages,
            "returns": returns,
            "advantages_whitened": masked_whiten(advantages, mask),
        },
        **whiten_tolerance(advantages, valid, "advantages_whitened"),
    )


def openrlhf_gae(
    rewards: Tensor, values: Tensor, case: Case, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """OpenRLHF counts a gap as steps of reward 0 and value 0: fill it, and it is no gap for ours."""
    rewards, values = keep(rewards, case.valid), keep(values, case.valid)
    return gae(rewards, values, torch.ones_like(case.valid), gamma=gamma, lam=lam)


def whiten_tolerance(x: Tensor, valid: Tensor, *names: str) -> dict[str, dict[str, float]]:
    """verl's mean and variance are short by the factor N / (N + 1e-8), which a small spread amplifies."""
    count = max(int(valid.sum()), 1)
    x = x[valid].double()
    std = (x.var() if count > 1 else torch.zeros((), dtype=x.dtype)).add(1e-8).sqrt().item()
    mean = abs(x.mean().item()) if len(x) else 0.0
    atol = 1e-11 + 2 * EPS_COUNT / count * mean * (1 + 1 / std)
    return {"rtol": dict.fromkeys(names, EPS_COUNT), "atol": dict.fromkeys(names, atol)}


def population(whitened: Tensor, x: Tensor, valid: Tensor) -> Tensor:
    """Ours is over the Bessel deviation with eps in the root, OpenRLHF's over the floored population one."""
    bessel = x[valid].var() if valid.sum() > 1 else x.new_zeros(())
    floored = x[valid].var(correction=0).clamp(min=1e-8) if valid.any() else x.new_ones(())
    return whitened * (bessel + 1e-8).sqrt() / floored.sqrt()


def check_whiten(case: Case) -> Ours:
    x, mask, valid = case["values"], case.mask, case.valid
    if case.params.get("dim") == 1:
        rows = [population(masked_whiten(r, k), r, k) for r, k in zip(x, valid, strict=True)]
        return Ours({"whitened": torch.stack(rows)})
    if case.params.get("no_std_norm"):
        return Ours({"whitened": x - masked_mean(x, mask)})
    whitened = masked_whiten(x, mask, case.params.get("shift_mean", True))
    if case.peer == "openrlhf":
        # The peer's mean of a single value is that value rounded to float32; 1e4 is its floored 1 / std.
        atol = 1e4 * 2**-24 * x[valid].abs().item() if valid.sum() == 1 else 0.0
        return Ours({"whitened": population(whitened, x, valid)}, atol={"whitened": atol})
    outputs = {"whitened": whitened, "mean": mean_over(x, mask, case.peer)}
    return Ours(outputs, **(whiten_tolerance(x, valid, "whitened") if case.peer == "verl" else {}))


def check_group_advantages(case: Case) -> Ours:
    return openrlhf_pipeline(case) if case.peer == "openrlhf" else verl_group_advantages(case)


def verl_group_advantages(case: Case) -> Ours:
    rewards, mask, valid = case["token_level_rewards"], case.mask, case.valid
    name = case.params["estimator"]
    if name == "reinforce_plus_plus":
        returns = discounted_returns(rewards, mask, gamma=case.params["gamma"])
        return Ours(
            {"advantages": masked_whiten(returns, mask), "returns": returns},
            **whiten_tolerance(returns, valid, "advantages"),
        )
    if name == "remax":
        returns = discounted_returns(rewards, mask, gamma=1.0)
        return Ours({"advantages": returns - case["reward_baselines"].unsqueeze(-1), "returns": returns})

    scores, ids = rewards.sum(-1), case["group_ids"]
    alone = (ids.unsqueeze(0) == ids.unsqueeze(1)).sum(0) == 1
    kind = {
        "rloo": "rloo",
        "grpo": "grpo" if case.params.get("norm_std") else "dr_grpo",
        "reinforce_plus_plus_baseline": "reinforce_baseline",
    }[name.removesuffix("_vectorized")]
    sequence_advantages = group_advantages(scores, ids, kind=kind)
    assert (sequence_advantages[alone] == 0).all()
    if kind == "reinforce_baseline":
        # verl leaves the score of a group of one as it is; here it takes part in the whitening.
        sequence_advantages = torch.where(alone, scores, sequence_advantages)
        spread = sequence_advantages.unsqueeze(-1).expand_as(mask)
        advantages = masked_whiten(spread, mask)
        return Ours(
            {"advantages": advantages, "returns": advantages},
            **whiten_tolerance(spread, valid, "advantages", "returns"),
        )
    advantages = keep(sequence_advantages.unsqueeze(-1), valid)
    # verl keeps the score of a group of one, except in rloo_vectorized; ours is 0, as asserted.
    compared = valid if name == "rloo_vectorized" else valid & ~alone.unsqueeze(-1)
    return Ours({"advantages": advantages, "returns": advantages}, valid=compared)


def openrlhf_pipeline(case: Case) -> Ours:
    params, mask, valid = case.params, case.mask, case.valid
    name, scores, kl = params["estimator"], case["scores"], case["kl"]
    groups = case["row_index"] // params["n_samples_per_prompt"]
    if name in ("rloo", "group_norm", "reinforce_baseline", "dr_grpo"):
        kind = "grpo" if name == "group_norm" else name
        raw, scores = scores, group_advantages(scores, groups, kind=kind)
        if kind == "grpo" and params["n_samples_per_prompt"] > 1:  # the peer adds 1e-9 to std, ours 1e-6
            std = torch.stack([raw[groups == group].std() for group in groups])
            scores = scores * (std + 1e-6) / (std + 1e-9)
    if params["reward_clip_range"]:
        scores = scores.clamp(*params["reward_clip_range"])
    rewards = shape_rewards(scores, kl, mask, params["kl_coef"])
    padding_kl = params["kl_coef"] * keep(kl, ~valid).sum(-1)  # counted by the peer's sum alone
    if name == "gae":
        advantages, returns = openrlhf_gae(rewards, case["values"], case, params["gamma"], params["lam"])
    else:
        gamma = params["gamma"] if name == "reinforce" else 1.0  # the peer forces 1 for group estimators
        advantages, _ = openrlhf_gae(rewards, torch.zeros_like(rewards), case, gamma, 1.0)
        returns = advantages
    if name in ("gae", "reinforce", "reinforce_baseline"):
        if params["no_std_norm"]:
            advantages = advantages - masked_mean(advantages, mask)
        else:
            advantages = population(masked_whiten(advantages, mask), advantages, valid)
    # An empty row gets no score here; the peer puts it on a masked column, which its sum counts.
    scored = valid.any(-1, keepdim=True)
    reward_sum = rewards.sum(-1) - padding_kl + keep(scores, ~scored.squeeze(-1))
    return Ours({"advantages": advantages, "returns": returns, "reward_sum": reward_sum})


def aggregation(params: dict[str, Any], mode: str) -> tuple[dict[str, Any], float]:
    """(arguments of `aggregate`, factor): peers multiply by the ranks that an engine will average over."""
    counts = {
        "num_tokens": params.get("batch_num_tokens"),
        "num_sequences": params.get("global_batch_size"),
        "scale": params.get("loss_scale_factor", params.get("scale_factor")),
    }
    if mode == "token-sum":  # a mean over one token
        return {"kind": "token_mean", "num_tokens": 1}, params.get("dp_size", 1)
    return {"kind": mode.replace("-", "_"), **counts}, params.get("dp_size", 1)


def loss_arguments(case: Case) -> tuple[dict[str, Any], float]:
    arguments, factor = aggregation(case.params.get("global_batch") or {}, case.params["agg_mode"])
    return {"aggregation": arguments.pop("kind"), **arguments}, factor


def check_agg_loss(case: Case) -> Ours:
    loss_matrix = case["loss_matrix"].requires_grad_()
    arguments, factor = aggregation(case.params, case.params["agg_mode"])
    rowwise = case.params["agg_mode"] == "seq-mean-token-mean"
    loss = factor * aggregate(loss_matrix * (row_factor(case) if rowwise else 1), case.mask, **arguments)
    return Ours({"loss": loss, "grad": grad(loss, loss_matrix)})


def check_policy_loss(case: Case) -> Ours:
    logprobs, old_logprobs, mask = case["logprobs"].requires_grad_(), case["old_logprobs"], case.mask
    kind = case.params["loss"]
    arguments, factor = loss_arguments(case)
    if kind == "gspo":
        return gspo(case, logprobs, old_logprobs, arguments, factor)
    if kind in ("gpg", "dro"):  # a policy gradient, for dro with a squared penalty
        per_token = -case["advantages"] * logprobs
        if kind == "dro":
            per_token = per_token + case.params["dro_beta"] * kl_estimate(logprobs, old_logprobs, "k2", mask)
        loss = aggregate(per_token, mask, kind=arguments["aggregation"])
        outputs = {"loss": loss, "grad_logprobs": grad(loss, logprobs)}
        approx_kl = mean_over(kl_estimate(old_logprobs, logprobs, "k1"), mask, case.peer)
        return Ours(outputs | {"approx_kl": approx_kl})
    return ppo_clip(case, logprobs, old_logprobs, mask, arguments, factor)


def ppo_clip(
    case: Case, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, arguments: dict[str, Any], factor: float
) -> Ours:
    loss, stats = policy_loss(
        logprobs,
        old_logprobs,
        case["advantages"],
        mask,
        clip_low=case.params["clip_low"],
        clip_high=case.params["clip_high"],
        dual_clip=case.params["dual_clip_c"],
        weights=loss_weights(case),
        **arguments,
    )
    loss = factor * loss
    grads = grad(loss, logprobs)
    if not (mask != 0).any():
        assert loss == 0
        assert (grads == 0).all()
    outputs = {"loss": loss, "grad_logprobs": grads, **stats}
    if case.peer == "verl":
        outputs["approx_kl"] = verl_mean(stats["approx_kl"], mask)
    if case.peer == "openrlhf":  # of the log-ratio before it is clamped
        outputs["approx_kl"] = masked_mean(kl_estimate(old_logprobs, logprobs, "k1"), mask)
    if case.peer == "trl":  # k2, with padding as zeros in the mean
        k2 = kl_estimate(logprobs, old_logprobs, "k2", mask)
        outputs["approx_kl"] = masked_mean(k2, torch.ones_like(mask))
        log_ratio = keep(logprobs - old_logprobs, mask != 0)
        beyond = log_ratio.abs() > 20
        if beyond.any():  # TRL does not clamp: its loss is one ratio of e^40; compare the other tokens
            assert torch.isfinite(loss)
            assert (grads[beyond] == 0).all()
            return Ours(outputs, valid=case.valid & ~beyond, left_out={"loss"})
    return Ours(outputs)


def gspo(
    case: Case, logprobs: Tensor, old_logprobs: Tensor, arguments: dict[str, Any], factor: float
) -> Ours:
    mask, valid = case.mask, case.valid
    if case.params.get("correction"):  # OpenRLHF: the ratio against the rollout, no token weights
        old_logprobs = case["rollout_logprobs"]
    lengths = valid.sum(-1, keepdim=True).clamp(min=1)
    excess = torch.zeros_like(old_logprobs)
    if case.peer == "verl":  # log of the sequence ratio clamped at 10 from above, ours at 20: move it to 10
        log_ratios = keep(logprobs.detach() - old_logprobs, valid).sum(-1, keepdim=True) / lengths
        excess = (log_ratios - 10).clamp(min=0).expand_as(mask)
    loss, stats = sequence_policy_loss(
        logprobs,
        old_logprobs + excess,
        case["advantages"],
        mask,
        clip_low=case.params["clip_low"],
        clip_high=case.params["clip_high"],
        weights=loss_weights(case),
        **arguments,
    )
    loss = factor * loss
    grads = grad(loss, logprobs)
    if case.peer == "openrlhf":  # differentiates through the mean: tokens of a row share their gradients
        grads = grads.sum(-1, keepdim=True) / lengths * valid
    else:
        grads = torch.where(excess > 0, 0.0, grads)
    outputs = {"loss": loss, "grad_logprobs": grads, **stats}
    outputs["approx_kl"] = mean_over(kl_estimate(case["old_logprobs"], logprobs, "k1"), mask, case.peer)
    return Ours(outputs)


def check_value_loss(case: Case) -> Ours:
    values = case["values"].requires_grad_()
    mask = case.seen if case.peer == "trl" else case.mask  # TRL: one column after the response counts
    arguments, factor = loss_arguments(case)
    loss, stats = value_loss(
        values, case["old_values"], case["returns"], mask, clip=case.params["clip"], **arguments
    )
    loss = factor * loss
    outputs = {"loss": loss, "grad_values": grad(loss, values), "clip_fraction": stats["clip_fraction"]}
    eps = dict.fromkeys(("loss", "grad_values"), EPS_COUNT)  # squares do not cancel: a bound will do
    return Ours(
        outputs, valid=mask != 0, rtol=eps if arguments["aggregation"] == "seq_mean_token_mean" else {}
    )


def check_kl_controller(case: Case) -> Ours:
    if case.params.get("kind") == "fixed":
        return fixed_coefficient(case)
    controller = AdaptiveKLController(*(case.params[name] for name in ("init", "target", "horizon")))
    coefs = []
    for kl, n_samples in zip(case.inputs["kl"], case.inputs["n_steps"], strict=True):
        controller.update(float(kl), int(n_samples))
        coefs.append(controller.coef)
    assert min(coefs) > 0
    # From the step where a peer's coefficient turns negative there is nothing to compare.
    sane = np.logical_and.accumulate(case.outputs["coef"] > 0)
    return Ours({"coef": torch.tensor(coefs, dtype=torch.float64)}, valid=torch.from_numpy(sane))


def fixed_coefficient(case: Case) -> Ours:
    """A fixed coefficient has no controller: the penalty of a recipe without a target has it."""
    penalty = KLPenalty(KLSettings(coef=case.params["init"]))
    coefs = []
    for kl, n_samples in zip(case.inputs["kl"], case.inputs["n_steps"], strict=True):
        logprobs = torch.full((int(n_samples), 1), float(kl))
        penalty.begin_step(logprobs, torch.zeros_like(logprobs), torch.ones_like(logprobs))
        penalty.end_step()
        coefs.append(penalty.coef)
    return Ours({"coef": torch.tensor(coefs, dtype=torch.float64)})


def check_rollout_correction(case: Case) -> Ours:
    if case.peer == "openrlhf":
        return openrlhf_correction(case)
    kind = case.params["kind"]
    if kind == "bypass":
        return verl_bypass(case)
    train, rollout, mask = case["train_logprobs"], case["rollout_logprobs"], case.mask
    outputs: dict[str, Tensor | float] = {}
    if kind != "rejection" and case.params["level"]:
        outputs = verl_weights(case, train, rollout, mask)
    if kind != "weights":
        outputs["new_mask"] = verl_rejection(case, train, rollout, mask)
    stats = mismatch_stats(train, rollout, mask)
    outputs |= {
        "metric_kl": verl_mean(stats["kl"], mask),
        "metric_k3": verl_mean(stats["kl_k3"], mask),
        "metric_chi2_token": verl_mean(stats["weight_sq_mean"], mask) - 1,
    }
    if kind == "full":  # verl does not clamp here
        log_ratio = keep(train - rollout, case.valid)
        if (log_ratio.abs() > 20).any():
            outputs["metric_kl"] = verl_mean(masked_mean(-log_ratio, mask), mask)
            outputs["metric_k3"] = verl_mean(masked_mean(log_ratio.exp() - 1 - log_ratio, mask), mask)
    return Ours(outputs, rtol={"weights": EPS_COUNT})


def verl_cap(threshold: Any) -> float | tuple[float, ...]:
    """A number, or a string `lo_hi`."""
    parts = [float(part) for part in str(threshold).split("_")]
    return parts[0] if len(parts) == 1 else tuple(parts)


def verl_weights(case: Case, train: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor | float]:
    cap = verl_cap(case.params["threshold"])
    kind = "icepop" if isinstance(cap, tuple) else "tis"
    if case.params["level"] == "sequence":
        kind = f"seq_{kind}"
    weights = importance_weights(train, rollout, mask, kind=kind, cap=cap)
    mean = masked_mean(weights, mask)
    ess = effective_sample_size(weights, mask)
    if mean > 0:  # verl adds an eps to the mean and to both counts
        ess = ess * ((verl_mean(mean, mask) + 1e-8) / mean).square() / verl_mean(torch.ones(()), mask)
    outputs: dict[str, Tensor | float] = {
        "metric_is_mean": verl_mean(mean, mask),
        "metric_is_ess": ess,
    }
    if case.params.get("batch_normalize"):
        over_rows = case.params["level"] == "sequence"
        weights = weights / (
            aggregate(weights, mask, kind="seq_mean_token_mean") if over_rows else masked_mean(weights, mask)
        ).clamp(min=1e-8)
    return outputs | {"weights": weights}


def verl_rejection(case: Case, train: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    kept = case.valid
    if not case.params["options"]:
        return kept
    options = case.params["options"].split(",")
    thresholds = str(case.params.get("rs_threshold") or case.params["threshold"]).split(",")
    thresholds = thresholds * len(options) if len(thresholds) == 1 else thresholds
    for option, threshold in zip(options, thresholds, strict=True):
        level, kind = option.rsplit("_", 1)
        bounds = verl_cap(threshold)
        if isinstance(bounds, tuple):  # verl bounds rollout / trainer, ours the weight trainer / rollout
            bounds = (1 / bounds[1], 1 / bounds[0])
        kept = kept & rejection_mask(train, rollout, mask, kind=kind, level=level, bounds=bounds)
    return kept


def verl_bypass(case: Case) -> Ours:
    logprobs, rollout = case["logprobs"].requires_grad_(), case["rollout_logprobs"]
    kept = verl_rejection(case, logprobs.detach(), rollout, case.mask)
    arguments, factor = loss_arguments(case)
    if case.params["loss_type"] == "ppo_clip":
        return ppo_clip(case, logprobs, rollout, kept, arguments, factor)
    weights = verl_weights(case, logprobs.detach(), rollout, case.mask)["weights"]
    loss = aggregate(-case["advantages"] * weights * logprobs, kept, kind=arguments["aggregation"])
    approx_kl = mean_over(kl_estimate(rollout, logprobs, "k1"), kept, case.peer)
    return Ours({"loss": loss, "grad_logprobs": grad(loss, logprobs), "approx_kl": approx_kl})


def openrlhf_correction(case: Case) -> Ours:
    old_logprobs, rollout, mask = case["old_logprobs"], case["rollout_logprobs"], case.mask
    low, high = case.params["thresholds"]
    if case.params["correction"] == "tis":  # OpenRLHF truncates on both sides
        weights = importance_weights(old_logprobs, rollout, mask, kind="tis", cap=high).clamp(min=low)
    else:
        kind = {"icepop": "icepop", "seq-mask-tis": "geo_mask"}[case.params["correction"]]
        weights = importance_weights(old_logprobs, rollout, mask, kind=kind, cap=(low, high))
    arguments, factor = loss_arguments(case)
    logprobs = case["logprobs"].requires_grad_()
    case.inputs["is_weights"] = weights.numpy()
    ours = ppo_clip(case, logprobs, old_logprobs, mask, arguments, factor)
    ours.outputs["rollout_kl"] = mismatch_stats(old_logprobs, rollout, mask)["kl"]
    return ours


ADAPTERS: dict[str, Callable[[Case], Ours]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


# ------------------------------------------------------------------------------------------------- tests


def reason_not_covered(case_id: str) -> str | None:
    return next((reason for prefix, reason in NOT_COVERED.items() if case_id.startswith(prefix)), None)


def compare(case: Case, ours: Ours) -> int:
    """Compares each of the peer's outputs; returns how many."""
    compared = 0
    valid = ours.valid if ours.valid is not None or "mask" not in case.inputs else case.valid
    for name, value in case.outputs.items():
        if name in ours.left_out or name in OUTPUTS_NOT_OURS.get(case.meta["function"], ()):
            continue
        got = torch.as_tensor(ours.outputs[name], dtype=torch.float64).detach().numpy()
        rtol, atol = case.meta["tol"].get(name, case.meta["tol"]["default"])
        rtol, atol = max(rtol, ours.rtol.get(name, 0.0)), max(atol, ours.atol.get(name, 0.0))
        assert got.shape == value.shape
        at = np.ones(value.shape, dtype=bool)
        if valid is not None and valid.shape == value.shape:
            at = valid.numpy()
        assert not np.isnan(got[at]).any(), name
        at = at & ~np.isnan(value)
        np.testing.assert_allclose(got[at], value[at], rtol=rtol, atol=atol, err_msg=name)
        compared += 1
    return compared


def absence_fails(environment: Mapping[str, str]) -> bool:
    """Whether it is an error that the reference numbers are not there."""
    return bool(environment.get("CI")) and environment.get("RLHF_DIST_NO_REFERENCE") != "1"


def test_the_reference_numbers_are_there() -> None:
    if not CASE_IDS and absence_fails(os.environ):
        pytest.fail(
            f"{CASES_DIR} has no reference numbers, so nothing was compared with other codebases; put them "
            "there, or set RLHF_DIST_NO_REFERENCE=1 to go without"
        )
    if not CASE_IDS:
        pytest.skip(ABSENT)


@pytest.mark.parametrize(
    ("environment", "fails"),
    [
        ({}, False),
        ({"CI": ""}, False),
        ({"CI": "true"}, True),
        ({"CI": "true", "RLHF_DIST_NO_REFERENCE": "1"}, False),
        ({"CI": "true", "RLHF_DIST_NO_REFERENCE": "0"}, True),
    ],
)
def test_continuous_integration_does_not_go_without_them_unless_told_to(
    environment: dict[str, str], fails: bool
) -> None:
    assert absence_fails(environment) == fails


@pytest.mark.skipif(not CASE_IDS, reason=ABSENT)
@pytest.mark.parametrize("case_id", [case_id for case_id in CASE_IDS if reason_not_covered(case_id) is None])
def test_peer(case_id: str) -> None:
    case = Case.load(case_id)
    ours = ADAPTERS[case.meta["function"]](case)
    compared = compare(case, ours)
    if case.meta["raises"]:
        for value in ours.outputs.values():
            assert torch.isfinite(torch.as_tensor(value, dtype=torch.float64)).all()
    else:
        assert compared > 0


@pytest.mark.skipif(not CASE_IDS, reason=ABSENT)
def test_every_case_is_compared_or_listed() -> None:
    listed = [case_id for case_id in CASE_IDS if reason_not_covered(case_id) is not None]
    rest = [case_id for case_id in CASE_IDS if case_id not in set(listed)]
    assert len(CASE_IDS) == 698
    assert len(listed) == 17
    assert {case_id.split("__")[0] for case_id in rest} == set(ADAPTERS)
    for prefix in NOT_COVERED:
        assert any(case_id.startswith(prefix) for case_id in listed), prefix
