"""Small numbers that can be checked by hand, and what is raised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from rlhf_dist.ops.kl import AdaptiveKLController, kl_estimate
from rlhf_dist.ops.logprobs import (
    entropy_from_logits,
    logprobs_and_entropy,
    logprobs_from_logits,
    next_tokens,
)
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
from rlhf_dist.ops.masked import last_valid, masked_mean, masked_whiten
from rlhf_dist.ops.returns import discounted_returns, gae, group_advantages, shape_rewards

LN2 = math.log(2)
NAN, INF = math.nan, math.inf


def close(got: Tensor, want: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-5, atol=atol)


# ------------------------------------------------------------------------------------------------ masked


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(dtype: torch.dtype) -> None:
    mask = tensor([[1, 0, 1]]).to(dtype)
    close(masked_mean(tensor([[1.0, NAN, 3.0]]), mask), 2.0)
    close(masked_whiten(tensor([[1.0, NAN, 3.0]]), mask), [[-math.sqrt(0.5), 0.0, math.sqrt(0.5)]])


def test_masked_mean_of_nothing_is_zero() -> None:
    x = tensor([[1.0, 2.0]], requires_grad=True)
    mean = masked_mean(x, torch.zeros(1, 2))
    mean.backward()
    assert mean == 0
    close(x.grad, [[0.0, 0.0]])


def test_whiten_can_leave_the_mean() -> None:
    x = tensor([[1.0, 3.0, 9.0]])
    mask = tensor([[1, 1, 0]])
    close(masked_whiten(x, mask, shift_mean=False), [[2 - math.sqrt(0.5), 2 + math.sqrt(0.5), 0.0]])


@pytest.mark.parametrize("value", [0.1, 1234.567, 1e6])
def test_whiten_of_equal_values_is_exactly_zero_or_the_value(value: float) -> None:
    x = torch.full((3, 11), value)
    close(masked_whiten(x, torch.ones(3, 11)), torch.zeros(3, 11))
    close(masked_whiten(x, torch.ones(3, 11), shift_mean=False), x)


def test_whiten_of_one_token() -> None:
    x, mask = tensor([[5.0, 7.0]]), tensor([[0, 1]])
    assert masked_whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert masked_whiten(x, mask, shift_mean=False).tolist() == [[0.0, 7.0]]


def test_last_valid() -> None:
    mask = tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert last_valid(mask).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


# -------------------------------------------------------------------------------------------------- kl


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [("k1", LN2, 1.0), ("abs", LN2, 1.0), ("k2", LN2**2 / 2, LN2), ("k3", 0.5 - 1 + LN2, 0.5)],
)
def test_kl_kinds(kind: str, value: float, slope: float) -> None:
    logprobs = tensor([[LN2 - 3]], requires_grad=True)
    kl = kl_estimate(logprobs, tensor([[-3.0]]), kind)
    kl.sum().backward()
    close(kl, [[value]])
    close(logprobs.grad, [[slope]])


@pytest.mark.parametrize("d", [-INF, -1e4, -100.0, 100.0, 1e4, INF])
def test_k3_stays_finite_with_no_gradient_beyond_the_clamp(d: float) -> None:
    logprobs = tensor([[d]], requires_grad=True)
    kl = kl_estimate(logprobs, tensor([[0.0]]), "k3")
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    close(logprobs.grad, [[0.0]])


@pytest.mark.parametrize(
    ("kind", "d", "value", "slope"),
    [
        ("k1", INF, INF, 1.0), ("k1", -INF, -INF, 1.0), ("k1", NAN, NAN, 1.0),
        ("abs", INF, INF, 1.0), ("abs", -INF, INF, -1.0), ("abs", NAN, NAN, 0.0),
        ("k2", INF, INF, 0.0), ("k2", -INF, INF, 0.0), ("k2", NAN, NAN, 0.0),
        ("k3", INF, 19.0, 0.0), ("k3", -INF, math.exp(20) - 21, 0.0), ("k3", NAN, NAN, 0.0),
    ],
)  # fmt: skip
def test_kl_of_what_is_not_finite(kind: str, d: float, value: float, slope: float) -> None:
    logprobs = tensor([[d]], requires_grad=True)
    kl = kl_estimate(logprobs, tensor([[0.0]]), kind)
    kl.sum().backward()
    torch.testing.assert_close(kl.detach(), tensor([[value]]), equal_nan=True)
    assert logprobs.grad.tolist() == [[slope]]


def test_controller_steps() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    controller.update(60.0, n_samples=10)  # clipped: +20 % of a tenth
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller.update(5.4, n_samples=10)  # 10 % below the target
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.99)
    resumed = AdaptiveKLController(0.5, target=6.0, horizon=100)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == controller.coef


def test_controller_survives_more_samples_than_five_horizons() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10)
    controller.update(0.0, n_samples=1000)
    assert controller.coef == pytest.approx(0.0002)
    controller.update(60.0, n_samples=1000)
    assert controller.coef == pytest.approx(0.0002 * 21)


@pytest.mark.parametrize(
    ("n_samples", "coef"),
    [(0, 0.2), (250, 0.1), (499, 0.0004), (500, 0.0002), (501, 0.0002), (10**9, 0.0002)],
)
def test_more_samples_of_a_low_kl_never_leave_a_larger_coefficient(n_samples: int, coef: float) -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    controller.update(0.0, n_samples)
    assert controller.coef == pytest.approx(coef)


def test_controller_ends_at_its_bounds_and_comes_back() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1)
    for _ in range(200):
        controller.update(INF, n_samples=10**6)
    assert controller.coef == 1e6
    controller.update(0.0, n_samples=1)
    assert controller.coef == pytest.approx(0.8e6)
    for _ in range(200):
        controller.update(0.0, n_samples=10**6)
    assert controller.coef == 1e-30
    controller.update(60.0, n_samples=10)
    assert controller.coef == pytest.approx(3e-30)


@pytest.mark.parametrize("coef", [0.0, 1e-40, 1e9])
def test_controller_leads_a_coefficient_outside_of_its_bounds_no_further_out(coef: float) -> None:
    controller = AdaptiveKLController(coef, target=6.0, horizon=100)
    controller.update(0.0 if coef < 1 else 60.0, n_samples=10**6)
    assert controller.coef == coef


@pytest.mark.parametrize(
    ("init", "target", "horizon"), [(-0.1, 1, 1), (0.1, 0, 1), (0.1, 1, 0), (NAN, 1, 1), (INF, 1, 1)]
)
def test_controller_refuses(init: float, target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match="received"):
        AdaptiveKLController(init, target, horizon)


@pytest.mark.parametrize("coef", [-0.1, NAN, INF])
def test_controller_refuses_the_state_of_none(coef: float) -> None:
    with pytest.raises(ValueError, match="expected a finite coefficient >= 0, received"):
        AdaptiveKLController(0.1, 1.0, 1.0).load_state_dict({"coef": coef})


def test_controller_refuses_a_kl_that_is_not_a_number() -> None:
    controller = AdaptiveKLController(0.2, 6.0, 10)
    with pytest.raises(ValueError, match="nan"):
        controller.update(NAN, 1)
    assert controller.coef == 0.2


# ------------------------------------------------------------------------------------------- logprobs


def test_logprobs_and_entropy_of_a_coin() -> None:
    logits = tensor([[[0.0, math.log(3.0)]]])
    close(logprobs_from_logits(logits, tensor([[1]])), [[math.log(0.75)]])
    close(entropy_from_logits(logits), [[-0.75 * math.log(0.75) - 0.25 * math.log(0.25)]])


def test_temperature_tempers_logprob_and_entropy() -> None:
    logits = tensor([[[0.0, math.log(9.0)]]])
    logprobs, entropy = logprobs_and_entropy(logits, tensor([[1]]), temperature=2.0)
    close(logprobs, [[math.log(0.75)]])
    close(entropy, [[-0.75 * math.log(0.75) - 0.25 * math.log(0.25)]])


def test_forbidden_token_has_no_entropy_and_no_gradient() -> None:
    logits = tensor([[[0.0, 0.0, -INF]]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, tensor([[0]]), temperature=0.5)
    close(entropy, [[LN2]])
    (logprobs + entropy).sum().backward()
    close(logits.grad, [[[1.0, -1.0, 0.0]]])
    assert logprobs_from_logits(logits, tensor([[2]])).tolist() == [[-INF]]


def test_row_without_upstream_gradient_gets_none_even_from_nan() -> None:
    logits = tensor([[[0.0, 1.0], [NAN, INF]]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, tensor([[0, 0]]))
    mask = tensor([[1, 0]])
    (masked_mean(logprobs, mask) + masked_mean(entropy, mask)).backward()
    assert torch.isfinite(logits.grad).all()
    close(logits.grad[0, 1], [0.0, 0.0])


def test_half_precision_comes_back_as_float32() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.long)
    logprobs = logprobs_from_logits(logits, labels)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    close(logprobs, logits.float().log_softmax(-1)[..., 0].detach())


def test_token_shift() -> None:
    tokens = tensor([[7, 8, 9]])
    assert next_tokens(tokens)[:, :2].tolist() == [[8, 9]]


def test_logprobs_refuse() -> None:
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        logprobs_from_logits(logits, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature"):
        entropy_from_logits(logits, temperature=0.0)


@pytest.mark.parametrize("function", [logprobs_from_logits, logprobs_and_entropy])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (tensor([[0, -100]]), r"expected labels in \[0, 5\), at masked positions too, .* from -100 to 0"),
        (tensor([[5, 4]]), r"expected labels in \[0, 5\), .* received labels from 4 to 5"),
        (tensor([[1.0, 2.5]]), r"expected integers as labels, received torch\.float32"),
        (tensor([[True, False]]), r"expected integers as labels, received torch\.bool"),
    ],
)
def test_labels_that_are_no_tokens_are_refused(function: object, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(1, 2, 5), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    close(logprobs_from_logits(torch.zeros(1, 2, 5), tensor([[0, 4]], dtype=dtype)), [[-math.log(5)] * 2])
    assert logprobs_from_logits(torch.zeros(1, 0, 5), torch.zeros(1, 0, dtype=dtype)).shape == (1, 0)


# -------------------------------------------------------------------------------------------- returns


def test_rewards_hold_the_score_at_the_last_chosen_token() -> None:
    kl = tensor([[1.0, NAN, 2.0, INF], [NAN, NAN, NAN, NAN]])
    mask = tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    rewards = shape_rewards(tensor([10.0, NAN]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_gae_by_hand() -> None:
    advantages, returns = gae(
        tensor([[0.0, 1.0]]), tensor([[0.5, 0.25]]), torch.ones(1, 2), gamma=0.5, lam=0.5
    )
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0.5 * 0.25 - 0.5 = -0.375; A_0 = -0.375 + 0.25 * 0.75
    assert advantages.tolist() == [[-0.1875, 0.75]]
    assert returns.tolist() == [[0.3125, 1.0]]


def test_gae_skips_a_gap() -> None:
    mask = tensor([[1, 0, 0, 1, 0]])
    rewards, values = tensor([[0.0, 9.0, NAN, 1.0, 9.0]]), tensor([[0.5, NAN, 9.0, 0.25, INF]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.1875, 0.0, 0.0, 0.75, 0.0]]
    assert returns.tolist() == [[0.3125, 0.0, 0.0, 1.0, 0.0]]


def test_discounted_returns_by_hand() -> None:
    returns = discounted_returns(tensor([[1.0, 7.0, 2.0, 4.0]]), tensor([[1, 0, 1, 1]]), gamma=0.5)
    assert returns.tolist() == [[3.0, 0.0, 4.0, 4.0]]


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("rloo", [-3.0, 0.0, 3.0, 0.0, 0.0, 0.0]),
        ("grpo", [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        ("dr_grpo", [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]),
        ("reinforce_baseline", [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]),
    ],
)
def test_group_advantages(kind: str, want: list[float]) -> None:
    scores = tensor([1.0, 5.0, 5.0, 3.0, 4.0, 4.0])  # groups {1, 3, 5}, {5}, {4, 4}
    ids = tensor([9, 2, 9, 9, -1, -1])
    got = group_advantages(scores, ids, kind=kind)
    close(got, [want[0], want[3], want[2], want[1], want[4], want[5]])


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo", "reinforce_baseline"])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_group_without_spread_is_exactly_zero(kind: str, size: int) -> None:
    assert group_advantages(torch.full((size,), 0.1), torch.zeros(size).long(), kind=kind).abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "want"),  # of seven times s and once s + d: m = s + d / 8, sd = d / sqrt(8)
    [
        ("rloo", (-1 / 7, 1.0)),
        ("grpo", (-math.sqrt(1 / 8), math.sqrt(49 / 8))),
        ("dr_grpo", (-1 / 8, 7 / 8)),
        ("reinforce_baseline", (-1 / 8, 7 / 8)),
    ],
)
@pytest.mark.parametrize("score", [0.0, 1000.0, 1000.1])
def test_group_advantages_of_scores_that_are_large_against_their_spread(
    kind: str, want: tuple[float, float], score: float
) -> None:
    d = 2**-13  # the last bit of 1000.1 in float32
    scores = torch.full((8,), score)
    scores[7] += d
    got = group_advantages(scores, torch.zeros(8).long(), kind=kind)
    unit = d / (d + math.sqrt(8) * 1e-6) if kind == "grpo" else d  # grpo adds 1e-6 to sd
    torch.testing.assert_close(got / unit, tensor([want[0]] * 7 + [want[1]]), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("token_mean", (1 + 2 + 3 + 4) / 4),
        ("seq_mean_token_sum", (6 + 4) / 2),
        ("seq_mean_token_mean", (2 + 4) / 2),
        ("seq_mean_token_sum_norm", (6 + 4) / 2 / 3),
    ],
)
def test_aggregations(kind: str, want: float) -> None:
    loss = tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    close(aggregate(loss, mask, kind=kind), want)
    half = aggregate(loss[:1], mask[:1], kind=kind, num_tokens=4, num_sequences=tensor(2))
    rest = aggregate(loss[1:], mask[1:], kind=kind, num_tokens=tensor(4), num_sequences=2.0)
    close(half + rest, want)


def test_scale_of_the_normalised_sum() -> None:
    loss = aggregate(torch.ones(1, 2), torch.ones(1, 2), kind="seq_mean_token_sum_norm", scale=8.0)
    close(loss, 0.25)


def ppo(log_ratio: float, advantage: float, dual_clip: float | None = None) -> tuple[Tensor, Tensor, dict]:
    logprobs = tensor([[log_ratio]], requires_grad=True)
    loss, stats = policy_loss(
        logprobs,
        torch.zeros(1, 1),
        tensor([[advantage]]),
        torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual_clip,
    )
    loss.backward()
    return loss.detach(), logprobs.grad, stats


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope", "clipped"),
    [
        (0.0, 2.0, -2.0, -2.0, 0.0),
        (LN2, 1.0, -1.3, 0.0, 1.0),  # above, and wanted: clipped
        (LN2, -1.0, 2.0, 2.0, 0.0),  # above, and unwanted: pushed back
        (-LN2, 1.0, -0.5, -0.5, 0.0),
        (-LN2, -1.0, 0.8, 0.0, 1.0),
    ],
)
def test_clipped_surrogate(
    log_ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    got, slope_got, stats = ppo(log_ratio, advantage)
    close(got, loss)
    close(slope_got, [[slope]])
    assert stats["clip_fraction"] == clipped
    assert stats["clip_fraction_low"] == clipped * (advantage < 0)
    assert stats["clip_fraction_high"] == clipped * (advantage > 0)
    close(stats["ratio_max"], math.exp(log_ratio))
    close(stats["approx_kl"], -log_ratio)
    close(stats["approx_kl_k3"], math.exp(log_ratio) - 1 - log_ratio)


def test_dual_clip_caps_the_loss_of_a_bad_token() -> None:
    loss, slope, stats = ppo(math.log(5.0), -1.0, dual_clip=3.0)
    close(loss, 3.0)
    close(slope, [[0.0]])
    assert stats["dual_clip_fraction"] == 1


@pytest.mark.parametrize("log_ratio", [-LN2, 0.0, LN2])
def test_dual_clip_leaves_good_tokens_alone(log_ratio: float) -> None:
    loss, slope, stats = ppo(log_ratio, 1.0, dual_clip=1.1)
    assert (loss, slope) == ppo(log_ratio, 1.0)[:2]
    assert stats["dual_clip_fraction"] == 0


@pytest.mark.parametrize("log_ratio", [-INF, -1e4, -50.0, 50.0, 1e4, INF])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_stay_finite_without_gradient(log_ratio: float, advantage: float) -> None:
    loss, slope, stats = ppo(log_ratio, advantage)
    assert torch.isfinite(loss)
    close(slope, [[0.0]])
    assert all(torch.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("log_ratio", [-20.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_largest_ratios_have_finite_gradients(log_ratio: float, dtype: torch.dtype) -> None:
    logprobs = torch.full((1, 1), log_ratio, dtype=dtype, requires_grad=True)
    zeros, ones = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    loss, _ = policy_loss(logprobs, zeros, -ones, ones, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_weights_multiply_the_loss() -> None:
    x = torch.zeros(1, 2)
    loss, _ = policy_loss(
        x, x, torch.ones(1, 2), torch.ones(1, 2), clip_low=0.2, clip_high=0.2, weights=tensor([[3.0, 0.0]])
    )
    close(loss, -1.5)


def test_sequence_ratio_is_the_geometric_mean() -> None:
    logprobs = tensor([[math.log(4.0), 0.0, NAN]], requires_grad=True)  # s = 2
    loss, stats = sequence_policy_loss(
        logprobs, torch.zeros(1, 3), -torch.ones(1, 3), tensor([[1, 1, 0]]), clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    close(loss, 2.0)
    close(logprobs.grad, [[1.0, 1.0, 0.0]])
    close(stats["ratio_mean"], 2.0)


@pytest.mark.parametrize("log_ratio", [-INF, -1e4, 1e4, INF])
def test_extreme_sequence_ratios_stay_finite(log_ratio: float) -> None:
    logprobs = tensor([[log_ratio, 0.0]], requires_grad=True)
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    loss, stats = sequence_policy_loss(logprobs, zeros, -ones, ones, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(value) for value in stats.values())


def test_value_loss_takes_the_worse_of_both() -> None:
    values = tensor([[1.0, 1.0, 3.0, NAN]], requires_grad=True)
    returns, mask = tensor([[2.0, 0.0, 3.5, NAN]]), tensor([[1, 1, 1, 0]])
    loss, stats = value_loss(values, tensor([[0.0, 0.0, 2.9, NAN]]), returns, mask, clip=0.5)
    loss.backward()
    # clipped to 0.5, 0.5, 3.0: errors max(1, 2.25), max(1, 0.25), max(0.25, 0.25)
    close(loss, (2.25 + 1.0 + 0.25) / 3 / 2)
    close(values.grad, [[0.0, 1 / 3, -0.5 / 3, 0.0]])
    close(stats["clip_fraction"], 1 / 3)
    close(stats["error_sq_mean"], (1.0 + 1.0 + 0.25) / 3)
    close(value_loss(values, values, returns, mask)[0].detach(), (1.0 + 1.0 + 0.25) / 3 / 2)


@pytest.mark.parametrize(
    ("kind", "cap", "want"),
    [
        ("none", None, [[1.0, 1.0, 0.0]]),
        ("tis", 2.0, [[2.0, 0.25, 0.0]]),
        ("seq_tis", 0.5, [[0.5, 0.5, 0.0]]),
        ("icepop", (0.2, 3.0), [[0.0, 0.25, 0.0]]),
        ("icepop", 3.0, [[0.0, 0.0, 0.0]]),
        ("seq_icepop", (0.5, 1.5), [[1.0, 1.0, 0.0]]),
        ("seq_icepop", (1.1, 1.5), [[0.0, 0.0, 0.0]]),
        ("geo_mask", 1.1, [[4.0, 0.25, 0.0]]),
        ("geo_mask", (1.1, 2.0), [[0.0, 0.0, 0.0]]),
    ],
)
def test_importance_weights(kind: str, cap: object, want: list[list[float]]) -> None:
    train, rollout = tensor([[math.log(4.0), math.log(0.25), NAN]]).requires_grad_(), torch.zeros(1, 3)
    got = importance_weights(train, rollout, tensor([[1, 1, 0]]), kind=kind, cap=cap)
    assert not got.requires_grad
    close(got, want)


HIGHEST, LOWEST = math.exp(20), math.exp(-20)


@pytest.mark.parametrize(
    ("kind", "cap", "row", "want"),
    [
        ("tis", 1e9, [INF, -INF, NAN], [HIGHEST, LOWEST, NAN]),
        ("tis", 2.0, [INF, 0.0, 0.0], [2.0, 1.0, 1.0]),
        ("icepop", 2.0, [INF, -INF, NAN], [0.0, 0.0, 0.0]),
        ("icepop", (0.0, 1e9), [INF, -INF, NAN], [HIGHEST, LOWEST, 0.0]),
        ("seq_tis", 2.0, [INF, INF, -9.0], [2.0, 2.0, 2.0]),
        ("seq_tis", 2.0, [-INF, -INF, 9.0], [LOWEST, LOWEST, LOWEST]),
        ("seq_tis", 2.0, [INF, -INF, 0.0], [NAN, NAN, NAN]),
        ("seq_tis", 2.0, [NAN, 0.0, 0.0], [NAN, NAN, NAN]),
        ("seq_icepop", (0.0, 1e9), [INF, 0.0, 0.0], [HIGHEST] * 3),
        ("seq_icepop", (0.0, 1e9), [INF, -INF, 0.0], [0.0, 0.0, 0.0]),
        ("seq_icepop", (0.0, 1e9), [NAN, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ("geo_mask", (0.0, 1e9), [-INF, 0.0, 0.0], [LOWEST, 1.0, 1.0]),
        ("geo_mask", (0.0, 1e9), [INF, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ("geo_mask", (0.0, 1e9), [INF, -INF, 0.0], [0.0, 0.0, 0.0]),
        ("geo_mask", (0.0, 1e9), [NAN, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_importance_weights_of_what_is_not_finite(
    kind: str, cap: object, row: list[float], want: list[float]
) -> None:
    got = importance_weights(tensor([row]), torch.zeros(1, 3), torch.ones(1, 3), kind=kind, cap=cap)
    torch.testing.assert_close(got, tensor([want]), equal_nan=True, rtol=1e-5, atol=0)


def test_rejection_and_mismatch_of_what_is_not_finite() -> None:
    train, rollout, mask = tensor([[INF, -INF], [NAN, 0.0]]), torch.zeros(2, 2), torch.ones(2, 2)

    def kept(kind: str, level: str, bounds: object) -> list[list[bool]]:
        return rejection_mask(train, rollout, mask, kind=kind, level=level, bounds=bounds).tolist()

    assert kept("k1", "token", (0.0, 1e9)) == [[True, True], [False, True]]
    assert kept("k1", "seq_sum", 1.1) == [[True, True], [False, False]]
    assert kept("k2", "seq_mean", 201.0) == [[True, True], [False, False]]
    assert kept("k2", "seq_max", 199.0) == [[False, False], [False, False]]
    stats = mismatch_stats(train[:1], rollout[:1], mask[:1])
    assert stats["abs_max"] == 20
    assert stats["kl"] == 0
    stats = mismatch_stats(train, rollout, mask)
    assert stats.pop("ess") == 0
    assert all(value.isnan() for value in stats.values())


@pytest.mark.parametrize(
    ("kind", "level", "bounds", "want"),
    [
        ("k1", "token", (0.9, 5.0), [[True, False, False]]),
        ("k1", "seq_sum", 1.5, [[True, True, False]]),
        ("k1", "seq_max", 3.0, [[False, False, False]]),
        ("k3", "token", 2.0, [[True, True, False]]),
        ("k2", "seq_mean", 0.9, [[False, False, False]]),
    ],
)
def test_rejection_mask(kind: str, level: str, bounds: object, want: list[list[bool]]) -> None:
    train = tensor([[math.log(4.0), math.log(0.25), NAN]])
    got = rejection_mask(train, torch.zeros(1, 3), tensor([[1, 1, 0]]), kind=kind, level=level, bounds=bounds)
    assert got.tolist() == want


def test_mismatch_of_equal_policies() -> None:
    stats = mismatch_stats(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2))
    want = {"kl": 0, "kl_k3": 0, "abs_max": 0, "weight_mean": 1, "weight_sq_mean": 1, "ess": 1}
    assert {name: value.item() for name, value in stats.items()} == want


def test_mismatch_is_of_the_rollout_from_the_trainer() -> None:
    """rho 4 and 1/4: of the k3 of KL(rollout || train), rho - 1 - log rho, at both tokens."""
    train, rollout = tensor([[math.log(4.0), math.log(0.25), NAN]]), torch.zeros(1, 3)
    stats = mismatch_stats(train, rollout, tensor([[1, 1, 0]]))
    close(stats["kl"], 0.0)
    close(stats["kl_k3"], (3.0 - 2 * LN2 - 0.75 + 2 * LN2) / 2)
    close(stats["abs_max"], 2 * LN2)
    close(stats["weight_mean"], (4 + 0.25) / 2)
    close(stats["weight_sq_mean"], (16 + 0.0625) / 2)
    one = mismatch_stats(train[:, :1], rollout[:, :1], torch.ones(1, 1))
    close(one["kl"], -2 * LN2)
    close(one["kl_k3"], 3.0 - 2 * LN2)


def test_effective_sample_size() -> None:
    close(effective_sample_size(tensor([[1.0, 0.0, 0.0, 0.0, NAN]]), tensor([[1, 1, 1, 1, 0]])), 0.25)
    assert effective_sample_size(torch.zeros(1, 2), torch.ones(1, 2)) == 0


def test_losses_refuse() -> None:
    x = torch.zeros(2, 3)
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    with pytest.raises(ValueError, match=r"old_logprobs \(2, 2\)"):
        policy_loss(x, torch.zeros(2, 2), x, x, **clip)
    with pytest.raises(ValueError, match=r"advantages \(2,\)"):
        policy_loss(x, x, torch.zeros(2), x, **clip)
    with pytest.raises(ValueError, match="2 dimensions"):
        policy_loss(x[0], x[0], x[0], x[0], **clip)
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(x, x, x, x, dual_clip=1.0, **clip)
    with pytest.raises(ValueError, match="token_mean"):
        policy_loss(x, x, x, x, aggregation="mean", **clip)
    with pytest.raises(ValueError, match="clip"):
        value_loss(x, x, x, x, clip=-0.1)
    with pytest.raises(ValueError, match="scale"):
        aggregate(x, x, kind="seq_mean_token_sum_norm", scale=0.0)
    with pytest.raises(ValueError, match="cap"):
        importance_weights(x, x, x, kind="tis", cap=(0.5, 2.0))
    with pytest.raises(ValueError, match="lo"):
        importance_weights(x, x, x, kind="icepop", cap=(2.0, 0.5))
    with pytest.raises(ValueError, match="icepop"):
        importance_weights(x, x, x, kind="ice")
    with pytest.raises(ValueError, match="scores"):
        shape_rewards(torch.zeros(3), x, x, 0.1)
    with pytest.raises(ValueError, match="group_ids"):
        group_advantages(torch.zeros(3), torch.zeros(2), kind="rloo")
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(x, x, "k4")


# ------------------------------------------------------------------------------------- calls by hand


def test_a_second_derivative_of_log_probabilities_is_refused():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    logprobs = logprobs_from_logits(logits.tanh(), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_that_the_caller_masks_reaches_no_gradient_of_a_kl_estimate(kind, garbage):
    x = torch.tensor([[-1.0, garbage]], requires_grad=True)
    mask = torch.tensor([[1, 0]])
    masked_mean(kl_estimate(x, torch.tensor([[-2.0, -1.0]]), kind), mask).backward()
    assert x.grad[0].isfinite().all()
    assert x.grad[0, 1] == 0


def test_statistics_of_float64_are_float64():
    x = torch.zeros(1, 2, dtype=torch.float64)
    _, stats = policy_loss(x, x, x + 1, x + 1, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    _, of_values = value_loss(x, x, x, x + 1, clip=0.2)
    assert {value.dtype for value in (stats | of_values).values()} == {torch.float64}


@pytest.mark.parametrize("clip", [{"clip_low": math.nan}, {"clip_low": -0.2}, {"clip_high": -0.5}])
def test_a_clip_range_that_is_none_is_refused(clip):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="expected clip_low >= 0 and clip_high >= 0"):
        policy_loss(x, x, x, x + 1, **({"clip_low": 0.2, "clip_high": 0.2} | clip))


@pytest.mark.parametrize("cap", [2, 2.0, np.int64(2), np.float32(2), torch.tensor(2.0)])
def test_a_cap_may_be_any_kind_of_number(cap):
    d = torch.tensor([[1.0, -1.0]])
    weights = importance_weights(d, torch.zeros(1, 2), torch.ones(1, 2), kind="tis", cap=cap)
    torch.testing.assert_close(weights, torch.tensor([[2.0, math.exp(-1)]]))


@pytest.mark.parametrize("cap", [(0.0, 2.0), [0, 2], np.array([0.0, 2.0])])
def test_a_range_may_begin_at_zero_and_be_any_pair(cap):
    d = torch.tensor([[1.0, -9.0]])
    weights = importance_weights(d, torch.zeros(1, 2), torch.ones(1, 2), kind="icepop", cap=cap)
    torch.testing.assert_close(weights, torch.tensor([[0.0, math.exp(-9)]]))


def test_effective_sample_size_of_huge_and_tiny_weights():
    for scale in (1e20, 1e-25):
        weights = torch.tensor([[1.0, 1.0, 2.0]]) * scale
        assert effective_sample_size(weights, torch.ones(1, 3)) == pytest.approx(16 / 18)
