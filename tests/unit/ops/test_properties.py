"""Properties that hold for every batch: any mask, any cut, any garbage in the padding."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_dist.ops import logprobs as logprobs_module
from rlhf_dist.ops.kl import KL_KINDS, AdaptiveKLController, kl_estimate
from rlhf_dist.ops.logprobs import entropy_from_logits, logprobs_and_entropy, logprobs_from_logits
from rlhf_dist.ops.losses import (
    AGGREGATIONS,
    REJECTION_LEVELS,
    WEIGHT_KINDS,
    effective_sample_size,
    importance_weights,
    mismatch_stats,
    policy_loss,
    rejection_mask,
    sequence_policy_loss,
    value_loss,
)
from rlhf_dist.ops.masked import masked_mean, masked_whiten
from rlhf_dist.ops.returns import GROUP_KINDS, discounted_returns, gae, group_advantages, shape_rewards

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@dataclass
class Batch:
    """Random tensors [B, T] in float64, and a mask with holes and rows without a token."""

    mask: Tensor
    generator: torch.Generator

    def normal(self, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(self.mask.shape, generator=self.generator, dtype=torch.float64)


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 0) -> Batch:
    rows, columns = draw(st.integers(min_rows, 5)), draw(st.integers(0, 7))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(rows, columns)
    return Batch(mask, torch.Generator().manual_seed(draw(st.integers(0, 2**32))))


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=False)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------ defining equations


@settings(max_examples=40, deadline=None)
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_defining_sum(batch: Batch, gamma: float, lam: float) -> None:
    rewards, values, mask = batch.normal(), batch.normal(), batch.mask
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    want = torch.zeros_like(rewards)
    for row in range(len(mask)):
        steps = mask[row].nonzero().flatten().tolist()
        v = [*values[row, steps].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            want[row, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(steps)))
    assert_close(advantages, want)
    assert_close(returns, torch.where(mask, want + values, 0.0))


@settings(max_examples=40, deadline=None)
@given(batches(), st.floats(0, 1))
def test_gae_with_lambda_one_is_return_minus_value(batch: Batch, gamma: float) -> None:
    rewards, values, mask = batch.normal(), batch.normal(), batch.mask
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    assert_close(returns, discounted_returns(rewards, mask, gamma=gamma))
    assert_close(advantages, torch.where(mask, returns - values, 0.0))


@settings(max_examples=40, deadline=None)
@given(batches())
def test_rewards_sum_to_score_minus_penalty(batch: Batch) -> None:
    kl, mask = batch.normal(), batch.mask
    scores = torch.arange(1.0, len(mask) + 1, dtype=torch.float64)
    total = shape_rewards(scores, kl, mask, 0.3).sum(-1)
    assert_close(total, torch.where(mask.any(-1), scores, 0.0) - 0.3 * (kl * mask).sum(-1))


@settings(max_examples=40, deadline=None)
@given(batches(), st.floats(-1e3, 1e3), st.booleans())
def test_whitened_has_mean_zero_and_variance_one(batch: Batch, shift: float, shift_mean: bool) -> None:
    x, mask = batch.normal() + shift, batch.mask
    whitened = masked_whiten(x, mask, shift_mean)
    assert (whitened[~mask] == 0).all()
    if mask.sum() > 1 and x[mask].std() > 0.1:
        kept = whitened[mask]
        mean = x[mask].mean() if not shift_mean else torch.zeros((), dtype=x.dtype)
        torch.testing.assert_close(kept.mean(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept.std(), torch.ones((), dtype=x.dtype), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.floats(-5, 5)), max_size=12), st.randoms())
def test_group_advantages_do_not_depend_on_the_order(rows: list[tuple[int, float]], random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    ids = torch.tensor([row[0] for row in rows], dtype=torch.long)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    for kind in GROUP_KINDS:
        advantages = group_advantages(scores, ids, kind=kind)
        torch.testing.assert_close(
            group_advantages(scores[order], ids[order], kind=kind), advantages[order], rtol=1e-6, atol=1e-6
        )
        for group in ids.unique():
            members = advantages[ids == group]
            assert members.sum().abs() < 1e-6
            if kind == "rloo" and len(members) > 1:
                own = scores[ids == group]
                others = (own.sum() - own) / (len(own) - 1)
                torch.testing.assert_close(members, own - others, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(-60, 60), st.floats(-60, 60), st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative(logprob: float, ref: float, dtype: torch.dtype) -> None:
    logprobs = torch.tensor([[logprob]], dtype=dtype, requires_grad=True)
    kl = kl_estimate(logprobs, torch.tensor([[ref]], dtype=dtype), "k3")
    kl.sum().backward()
    assert kl.item() >= 0
    assert torch.isfinite(logprobs.grad).all()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1e-30, 1e6),
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 10**9)), min_size=1, max_size=20),
)
def test_controller_moves_the_right_way_and_stays_in_bounds(
    init: float, steps: list[tuple[float, int]]
) -> None:
    controller = AdaptiveKLController(init, target=3.0, horizon=1000.0)
    for kl, n_samples in steps:
        before = controller.coef
        controller.update(kl, n_samples)
        assert 1e-30 <= controller.coef <= 1e6
        assert controller.coef >= 0.000999 * before
        assert (controller.coef >= before) if kl >= 3.0 else (controller.coef <= before)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1e-30, 1e6), st.floats(-10, 10), st.floats(0, 10), st.integers(0, 10**5), st.integers(0, 10**5)
)
def test_controller_is_monotone(init: float, kl: float, more: float, n_samples: int, later: int) -> None:
    """In the KL; and in the number of samples, away from where it is."""

    def after(kl: float, n_samples: int) -> float:
        controller = AdaptiveKLController(init, target=3.0, horizon=1000.0)
        controller.update(kl, n_samples)
        return controller.coef

    assert after(kl, n_samples) <= after(kl + more, n_samples)
    few, many = after(kl, n_samples), after(kl, n_samples + later)
    assert (many >= few) if kl >= 3.0 else (many <= few)


@settings(max_examples=40, deadline=None)
@given(batches(), st.floats(0.3, 3.0))
def test_logprobs_and_entropy_are_those_of_log_softmax(batch: Batch, temperature: float) -> None:
    logits = torch.randn(
        *batch.mask.shape, 6, generator=batch.generator, dtype=torch.float64
    ).requires_grad_()
    labels = torch.randint(6, batch.mask.shape, generator=batch.generator)
    upstream = batch.normal(), batch.normal()

    def gradient(logprobs: Tensor, entropy: Tensor) -> Tensor:
        total = (logprobs * upstream[0]).sum() + (entropy * upstream[1]).sum()
        return torch.autograd.grad(total, logits)[0]

    log_p = (logits / temperature).log_softmax(-1)
    want = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    got = logprobs_and_entropy(logits, labels, temperature)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    want_gradient = gradient(*want)
    assert_close(gradient(*got), want_gradient)
    apart = logprobs_from_logits(logits, labels, temperature), entropy_from_logits(logits, temperature)
    assert_close(gradient(*apart), want_gradient)


# ----------------------------------------------------------------------------------------------- garbage


def loss_of(function: Callable[..., tuple[Tensor, dict[str, Tensor]]], **keywords: object) -> Callable:
    """A function of (differentiable, constant, constant, mask) to a scalar and its statistics."""

    def run(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss, stats = function(x, y, z, mask, **keywords)
        return loss, *stats.values()

    return run


def kl_of(kind: str) -> Callable:
    return lambda x, y, _z, mask: (kl_estimate(x, y, kind, mask),)


def weights_of(kind: str) -> Callable:
    return lambda x, y, _z, mask: (importance_weights(x, y, mask, kind=kind, cap=1.5),)


def rejection_of(level: str) -> Callable:
    return lambda x, y, _z, mask: (rejection_mask(x, y, mask, kind="k3", level=level, bounds=0.5).double(),)


EVERY_FUNCTION: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "policy_loss": loss_of(policy_loss, dual_clip=3.0, **CLIP),
    "policy_loss_weighted": lambda x, y, z, mask: policy_loss(x, y, z, mask, weights=z, **CLIP)[:1],
    "sequence_policy_loss": loss_of(sequence_policy_loss, **CLIP),
    "value_loss": loss_of(value_loss, clip=0.2),
    "masked_mean": lambda x, _y, _z, mask: (masked_mean(x, mask),),
    "masked_whiten": lambda x, _y, _z, mask: (masked_whiten(x, mask), masked_whiten(x, mask, False)),
    "gae": lambda x, y, _z, mask: gae(x, y, mask, gamma=0.9, lam=0.8),
    "discounted_returns": lambda x, _y, _z, mask: (discounted_returns(x, mask, gamma=0.9),),
    "shape_rewards": lambda x, _y, _z, mask: (shape_rewards(x.new_ones(len(x)), x, mask, 0.1),),
    "mismatch_stats": lambda x, y, _z, mask: tuple(mismatch_stats(x, y, mask).values()),
    "effective_sample_size": lambda x, _y, _z, mask: (effective_sample_size(x.abs(), mask),),
    **{f"kl_{kind}": kl_of(kind) for kind in KL_KINDS},
    **{f"weights_{kind}": weights_of(kind) for kind in WEIGHT_KINDS},
    **{f"rejection_{level}": rejection_of(level) for level in REJECTION_LEVELS},
}


def results_and_gradients(function: Callable, tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    results = function(*tensors, mask)
    total = sum(result.sum() for result in results if result.requires_grad)
    if not isinstance(total, Tensor):
        return list(results)
    gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    return [*results, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("name", EVERY_FUNCTION)
@settings(max_examples=10, deadline=None)
@given(batch=batches(), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
def test_garbage_in_the_padding_changes_nothing(name: str, batch: Batch, garbage: float) -> None:
    clean = [batch.normal() for _ in range(3)]
    dirty = [torch.where(batch.mask, tensor, garbage) for tensor in clean]
    want = results_and_gradients(EVERY_FUNCTION[name], clean, batch.mask)
    got = results_and_gradients(EVERY_FUNCTION[name], dirty, batch.mask)
    for ours, theirs in zip(got, want, strict=True):
        assert_equal(ours, theirs)
        if ours.shape == batch.mask.shape:
            assert (ours[~batch.mask] == 0).all()


@pytest.mark.parametrize("name", EVERY_FUNCTION)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_valid_token_gives_zeros(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = [torch.full(shape, math.nan, dtype=dtype) for _ in range(3)]
    for number in results_and_gradients(EVERY_FUNCTION[name], tensors, torch.zeros(shape)):
        assert torch.isfinite(number).all()
        if number.shape == shape:
            assert (number == 0).all()


@pytest.mark.parametrize("function", [policy_loss, sequence_policy_loss, value_loss])
@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_an_empty_batch_has_loss_zero_and_can_go_backward(function: Callable, kind: str) -> None:
    keywords = {} if function is value_loss else CLIP
    x = torch.full((2, 3), math.nan, requires_grad=True)
    loss, _ = function(x, x.detach(), x.detach(), torch.zeros(2, 3), aggregation=kind, **keywords)
    loss.backward()
    assert loss == 0
    assert_equal(x.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY_FUNCTION)
@settings(max_examples=5, deadline=None)
@given(batch=batches(min_rows=1))
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype, batch: Batch) -> None:
    half = [batch.normal().to(dtype) for _ in range(3)]
    got = EVERY_FUNCTION[name](*half, batch.mask)
    want = EVERY_FUNCTION[name](*(tensor.float() for tensor in half), batch.mask)
    for ours, theirs in zip(got, want, strict=True):
        assert_equal(ours, theirs)


# ------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("function", [policy_loss, sequence_policy_loss, value_loss])
@pytest.mark.parametrize("kind", AGGREGATIONS)
@settings(max_examples=15, deadline=None)
@given(batch=batches(), cut=st.integers(0, 5))
def test_pieces_add_up_to_the_whole(function: Callable, kind: str, batch: Batch, cut: int) -> None:
    x, y, z, mask = batch.normal().requires_grad_(), batch.normal(), batch.normal(), batch.mask
    keywords = {"clip": 0.2} if function is value_loss else {"dual_clip": 3.0, **CLIP}
    if function is sequence_policy_loss:
        keywords = CLIP
    whole, stats = function(x, y, z, mask, aggregation=kind, **keywords)
    whole_gradient = torch.autograd.grad(whole, x)[0]

    counts = {"num_tokens": mask.sum(), "num_sequences": mask.any(-1).sum().item()}
    pieces = [
        (
            function(x[rows], y[rows], z[rows], mask[rows], aggregation=kind, **counts, **keywords),
            mask[rows].sum(),
        )
        for rows in (slice(cut), slice(cut, None))
    ]
    total = sum(loss for (loss, _), _ in pieces)
    assert_close(total, whole)
    assert_close(torch.autograd.grad(total, x)[0], whole_gradient)
    for name, value in stats.items():
        parts = torch.stack([piece_stats[name].double() for (_, piece_stats), _ in pieces])
        weights = torch.stack([count for _, count in pieces])
        if name.endswith("_max"):
            combined = parts.max()
        elif name.endswith("_min"):
            combined = parts.min()
        else:
            combined = (parts * weights).sum() / weights.sum().clamp(min=1)
        torch.testing.assert_close(combined, value.double(), rtol=1e-6, atol=1e-7)


@given(batches(), st.integers(1, 3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_ranks_whiten_as_one_batch(batch: Batch, num_ranks: int, shift_mean: bool) -> None:
    x, mask = batch.normal() + 3.0, batch.mask
    whole = masked_whiten(x, mask, shift_mean), masked_mean(x, mask), effective_sample_size(x.abs(), mask)
    slots: list[Tensor] = [torch.empty(0)] * num_ranks
    barrier = threading.Barrier(num_ranks, timeout=10)
    results: list[tuple[Tensor, Tensor, Tensor]] = [None] * num_ranks

    def rank_main(rank: int) -> None:
        def all_reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        own_x, own_mask = x[rank::num_ranks], mask[rank::num_ranks]
        results[rank] = (
            masked_whiten(own_x, own_mask, shift_mean, all_reduce=all_reduce),
            masked_mean(own_x, own_mask, all_reduce=all_reduce),
            effective_sample_size(own_x.abs(), own_mask, all_reduce=all_reduce),
        )

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, (whitened, mean, ess) in enumerate(results):
        assert_close(whitened, whole[0][rank::num_ranks])
        assert_close(mean, whole[1])
        assert_close(ess, whole[2])


def test_gradient_of_a_global_mean_is_each_ranks_own_share() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    mean = masked_mean(x, torch.ones(1, 2), all_reduce=lambda own: own + torch.tensor([7.0, 3.0]))
    mean.backward()
    assert mean == 2.0
    assert_close(x.grad, torch.full((1, 2), 0.2))


# ------------------------------------------------------------------------------------------------ chunks


class PeakFloat32(TorchDispatchMode):
    """The most bytes that float32 tensors made inside have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            storage = out.untyped_storage()
            self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
            self.alive[StorageWeakRef(storage)] = storage.nbytes()
            self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("view", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_no_float32_copy_of_the_logits(
    view: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, rows_in_chunk = 512, 3
    chunk_bytes = logprobs_module.BUFFERS * 4 * vocab * rows_in_chunk
    monkeypatch.setattr(logprobs_module, "CHUNK_BYTES", chunk_bytes)
    leaf = torch.randn(5, 9, vocab, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    logits = {"contiguous": leaf, "sliced": leaf[:, 1:], "transposed": leaf.transpose(0, 1)}[view]
    labels = torch.arange(logits.shape[:-1].numel()).reshape(logits.shape[:-1]) % vocab
    with PeakFloat32() as float32:
        logprobs, entropy = logprobs_and_entropy(logits, labels, temperature)
        (logprobs.sum() + entropy.square().sum()).backward()
    one_a_token = 4 * labels.numel()
    assert 0 < float32.peak <= chunk_bytes + 10 * one_a_token
    assert chunk_bytes + 10 * one_a_token < 4 * logits.numel() / 4
    gradient, leaf.grad = leaf.grad, None

    log_p = (logits.float() / temperature).log_softmax(-1)
    want = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    (want[0].sum() + want[1].square().sum()).backward()
    torch.testing.assert_close(logprobs, want[0])
    torch.testing.assert_close(entropy, want[1])
    torch.testing.assert_close(gradient, leaf.grad, rtol=2e-2, atol=2e-2)
