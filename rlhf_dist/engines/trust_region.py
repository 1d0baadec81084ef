"""A trust-region step of the policy over the whole batch of a learner step, on one rank of several.

Consumes a step's data and the policy as it was before, leaves the policy with new parameters. Every rank
works on its share of the batch in micro-batches; gradients, Fisher products, losses and divergences are sums
over the ranks, and rank 0's inner products and step are everybody's, so that all decide and move alike.

The Fisher matrix is J^T H J (Gauss-Newton), J the Jacobian of the logits and H = diag(p) - p p^T that of the
softmax: exact over the vocabulary, never indefinite, and equal to the Hessian of the KL at the old policy,
where the KL's gradient by the logits is 0. A product needs J v, which is one forward-mode pass, and then one
backward pass; nothing is differentiated twice.

A pass holds the logits of one micro-batch, [R, K, V], and a few copies of those of its valid tokens, [n, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_dist.algorithms.base import Algorithm, MicroBatch, Stats, TrustRegion
from rlhf_dist.data.batching import RankBatches
from rlhf_dist.engines.pieces import StepData, named
from rlhf_dist.errors import ModelError
from rlhf_dist.experience.sequences import SequenceBatch
from rlhf_dist.ops.logprobs import logprobs_and_entropy
from rlhf_dist.ops.trust_region import backtrack, natural_gradient_step

Share = Callable[[torch.Tensor], torch.Tensor]
"""A collective: one tensor from those that the ranks pass, the same on each, on the CPU."""

Parameters = dict[str, torch.Tensor]


@dataclass
class Evaluation:
    """What some parameters are worth on the batch."""

    loss: float = 0.0
    """The policy loss, over all ranks."""
    kl: float = 0.0
    """Mean KL(old || new) a token in nats, over all ranks."""
    pieces: list[tuple[Stats, int]] = field(default_factory=list)
    """Statistics of this rank's micro-batches and their tokens."""


class BatchObjective:
    """Policy loss and KL over a batch, as functions of a step [P] from the parameters at construction.

    P counts the trained parameters of the model, in its order. Every method is a collective.
    """

    def __init__(
        self,
        lm: nn.Module,
        algorithm: Algorithm,
        data: StepData,
        batches: RankBatches,
        *,
        rank: int,
        packed: bool,
        temperature: float,
        sum_over_ranks: Share,
    ) -> None:
        """Remember the parameters.

        Args:
            lm: a causal language model in the manner of transformers; whole on every rank.
            batches: the whole batch, cut over ranks and micro-batches.
            packed: whether the model takes its sequences packed.
            temperature: what log-probabilities are taken at.
        """
        self._lm, self._algorithm, self._data, self._temperature = lm, algorithm, data, temperature
        self._micro_batches = [indices for indices in batches[rank] if indices]
        self._counts = data.counts(batches)
        self._num_tokens = max(self._counts[0], 1)
        self._sum, self._packed = sum_over_ranks, packed
        self._parameters: Parameters = {
            name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad
        }
        self._old = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._device = next(iter(self._old.values())).device

    def gradient(self) -> tuple[Evaluation, torch.Tensor]:
        """The old policy's evaluation, and the gradient [P] of its loss."""
        total = _Total(self._old)
        evaluation = Evaluation()
        for sequences, micro in self._pieces():
            loss = self._add(evaluation, self._logits(sequences, micro, self._parameters), sequences, micro)
            total.add(self._backward(loss))
        return self._over_ranks(evaluation), self._sum(total.vector)

    def fisher_product(self, vector: torch.Tensor) -> torch.Tensor:
        """F v at the old policy, [P] -> [P]. The parameters must be the old ones."""
        total = _Total(self._old)
        tangents = self._split(vector)
        for sequences, micro in self._pieces():
            moved = self._logits_along(tangents, sequences, micro) / self._temperature  # [n, V]
            logits = self._logits(sequences, micro, self._parameters) / self._temperature  # [n, V]
            p = logits.detach().softmax(-1)
            weighted = p * (moved - (p * moved).sum(-1, keepdim=True)) / self._num_tokens  # H J v
            total.add(self._backward(logits, weighted))
        return self._sum(total.vector)

    @torch.no_grad()
    def move(self, step: torch.Tensor) -> Evaluation:
        """Take the parameters to the old ones plus `step` [P]; what they are worth there."""
        for name, change in self._split(step).items():
            self._parameters[name].copy_(self._old[name] + change)
        evaluation = Evaluation()
        for sequences, micro in self._pieces():
            logits = self._logits(sequences, micro, self._parameters)
            self._add(evaluation, logits, sequences, micro)
            log_p, log_q = (
                (each / self._temperature).log_softmax(-1)
                for each in (self._logits(sequences, micro, self._old), logits)
            )
            evaluation.kl += float((log_p.exp() * (log_p - log_q)).sum()) / self._num_tokens
        return self._over_ranks(evaluation)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back the old parameters, bit by bit."""
        for name, old in self._old.items():
            self._parameters[name].copy_(old)

    def _pieces(self) -> Iterator[tuple[SequenceBatch, MicroBatch]]:
        for indices in self._micro_batches:
            sequences = self._data.samples.sequences(indices, packed=self._packed).to(self._device)
            yield sequences, self._data.piece(indices, *self._counts).to(self._device)

    def _logits(self, sequences: SequenceBatch, micro: MicroBatch, parameters: Parameters) -> torch.Tensor:
        """[n, V]: what the valid tokens of a piece, row by row, were drawn from."""
        inputs = sequences.inputs() | {"logits_to_keep": sequences.kept}
        logits = functional_call(self._lm, parameters, args=(), kwargs=inputs).logits  # [R, K, V]
        return logits.flatten(0, 1)[_places(sequences, micro)]

    def _logits_along(
        self, tangents: Parameters, sequences: SequenceBatch, micro: MicroBatch
    ) -> torch.Tensor:
        """[n, V]: the derivative of `_logits` in a direction. Only the plain attention kernel has one.

        Raises:
            ModelError: the model has an operation without a forward-mode derivative.
        """
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {
                name: forward_ad.make_dual(parameter, tangents[name])
                for name, parameter in self._parameters.items()
            }
            try:
                moved = self._logits(sequences, micro, duals)
            except NotImplementedError as error:
                raise ModelError(
                    f"the policy ({type(self._lm).__name__}) has no forward-mode derivative, which a step in "
                    "a trust region needs; choose another algorithm.name, as ppo_kl "
                    f"({str(error).splitlines()[0]})"
                ) from error
            return forward_ad.unpack_dual(moved).tangent

    def _add(
        self, evaluation: Evaluation, logits: torch.Tensor, sequences: SequenceBatch, micro: MicroBatch
    ) -> torch.Tensor:
        """Count a piece with these logits [n, V]; returns its share of the loss."""
        labels = sequences.labels.flatten()[_places(sequences, micro)]
        logprobs, entropy = (
            each.new_zeros(micro.mask.shape).masked_scatter(micro.mask, each)  # [b, T]
            for each in logprobs_and_entropy(logits, labels, self._temperature)
        )
        loss, stats = self._algorithm.policy_objective(logprobs, entropy, micro)
        evaluation.loss += float(loss.detach())
        evaluation.pieces.append((named("policy", loss, stats, micro), int(micro.mask.sum())))
        return loss

    def _backward(
        self, outputs: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        inputs = tuple(self._parameters.values())
        return torch.autograd.grad(outputs, inputs, weights, materialize_grads=True)

    def _split(self, vector: torch.Tensor) -> Parameters:
        parts = vector.to(self._device).split([old.numel() for old in self._old.values()])
        return {name: part.view_as(old) for part, (name, old) in zip(parts, self._old.items(), strict=True)}

    def _over_ranks(self, evaluation: Evaluation) -> Evaluation:
        mine = torch.tensor([evaluation.loss, evaluation.kl], dtype=torch.float64)
        loss, kl = self._sum(mine).tolist()
        return Evaluation(loss, kl, evaluation.pieces)


def trust_region_step(
    objective: BatchObjective, region: TrustRegion, *, from_rank_0: Share
) -> tuple[dict[str, float], list[tuple[Stats, int]]]:
    """Move the policy; where no fraction of the step will do, it is as it was.

    Returns:
        (metrics, the same on every rank; statistics of this rank's pieces under the policy as it is now)
    """
    before, gradient = objective.gradient()
    step = natural_gradient_step(
        -gradient,
        lambda vector: objective.fisher_product(vector) + region.cg_damping * vector,
        max_kl=region.max_kl,
        num_iterations=region.cg_iterations,
        dot=lambda one, other: from_rank_0(one @ other),
    )
    step = from_rank_0(step)
    tried = {0.0: before}

    def attempt(fraction: float) -> tuple[float, float]:
        tried[fraction] = objective.move(fraction * step)
        return before.loss - tried[fraction].loss, tried[fraction].kl

    fraction = backtrack(attempt, max_kl=region.max_kl, num_tries=region.backtrack_tries)
    if fraction == 0:
        objective.restore()
    after = tried[fraction]
    metrics = {
        "policy_grad_norm": float(from_rank_0(gradient.norm())),
        "policy_step_fraction": fraction,
        "policy_step_kl": after.kl,
        "policy_surrogate_improvement": before.loss - after.loss,
    }
    return metrics, after.pieces


class _Total:
    """A sum of gradients as one vector [P]."""

    def __init__(self, parameters: Parameters) -> None:
        first = next(iter(parameters.values()))
        self.vector = torch.zeros(sum(each.numel() for each in parameters.values()), dtype=first.dtype)

    def add(self, gradients: Iterable[torch.Tensor]) -> None:
        self.vector += torch.cat([each.reshape(-1) for each in gradients]).to(self.vector.device)


def _places(sequences: SequenceBatch, micro: MicroBatch) -> torch.Tensor:
    """[n]: the places of the valid tokens among the batch's kept columns, counted row by row."""
    places = torch.arange(sequences.labels.numel(), device=micro.mask.device)
    return sequences.responses(places.view_as(sequences.labels))[micro.mask]
