"""The parts of recipes: corrections for the sampler, and the KL penalty."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from rlhf_dist.algorithms.parts.correction import CorrectionSettings, correct
from rlhf_dist.algorithms.parts.kl import KLPenalty, KLSettings

MASK = torch.tensor([[True, True], [True, False]])
LEARNER = torch.tensor([[math.log(4.0), math.log(0.25)], [math.log(1.5), 77.0]])  # ratios 4, 1/4 and 1.5
ROLLOUT = torch.zeros(2, 2)


def corrected(**values):
    return correct(CorrectionSettings(**values), LEARNER, ROLLOUT, MASK)


# ---------------------------------------------------------------------------------------- corrections


@pytest.mark.parametrize(
    ("values", "weights", "share"),
    [
        ({"kind": "tis", "cap": 2.0}, [[2.0, 0.25], [1.5, 0]], ("truncated", 1 / 3)),
        ({"kind": "tis", "cap": 5.0}, [[4.0, 0.25], [1.5, 0]], ("truncated", 0.0)),
        ({"kind": "tis", "cap": 1.1}, [[1.1, 0.25], [1.1, 0]], ("truncated", 2 / 3)),
        ({"kind": "seq_tis", "cap": 1.2}, [[1.0, 1.0], [1.2, 0]], ("truncated", 1 / 3)),
        ({"kind": "icepop", "cap": 2.0}, [[0.0, 0.0], [1.5, 0]], ("dropped", 2 / 3)),
        ({"kind": "icepop", "cap": (0.1, 2.0)}, [[0.0, 0.25], [1.5, 0]], ("dropped", 1 / 3)),
        ({"kind": "seq_icepop", "cap": 1.2}, [[1.0, 1.0], [0.0, 0]], ("dropped", 1 / 3)),
        ({"kind": "geo_mask", "cap": 1.2}, [[4.0, 0.25], [0.0, 0]], ("dropped", 1 / 3)),
    ],
)
def test_weights_and_the_share_that_is_cut(values, weights, share):
    correction = corrected(**values)
    torch.testing.assert_close(correction.weights, torch.tensor(weights))
    name, expected = share
    assert correction.metrics == pytest.approx(
        {
            f"correction_{name}_share": expected,
            "correction_weight_mean": sum(map(sum, weights)) / 3,
        },
        rel=1e-5,
    )


def test_without_a_correction_every_token_weighs_the_same():
    correction = corrected()
    assert correction.weights is None
    assert correction.metrics == {}
    assert correction.old_logprobs is LEARNER


def test_the_samplers_log_probabilities_may_be_the_old_ones():
    assert corrected(old_logprobs="rollout").old_logprobs is ROLLOUT
    assert corrected(kind="tis").old_logprobs is LEARNER


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "tis", "cap": (0.5, 2.0)}, r"kind=tis truncates at one positive number, not cap=\(0\.5, 2"),
        ({"kind": "seq_tis", "cap": 0.0}, r"kind=seq_tis truncates at one positive number, not cap=0\.0"),
        ({"kind": "icepop", "cap": 0.5}, r"kind=icepop keeps what is inside .* not cap=0\.5"),
        ({"kind": "geo_mask", "cap": (2.0, 1.0)}, r"kind=geo_mask keeps .* not cap=\(2\.0, 1\.0\)"),
        ({"kind": "tis", "old_logprobs": "rollout"}, r"kind=tis would count it twice"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        CorrectionSettings(**values)


# -------------------------------------------------------------------------------------------- penalty


def test_a_reward_penalty_has_no_term_in_the_loss():
    penalty = KLPenalty(KLSettings(coef=0.5))
    off_rewards, coef = penalty.begin_step(LEARNER, ROLLOUT, MASK)
    expected = [[0.5 * math.log(4), 0.5 * math.log(0.25)], [0.5 * math.log(1.5), 0]]
    torch.testing.assert_close(off_rewards, torch.tensor(expected))
    assert coef == 0.5
    assert penalty.loss_of_tokens(LEARNER, ROLLOUT, MASK) is None


def test_a_loss_penalty_takes_nothing_off_the_rewards():
    penalty = KLPenalty(KLSettings(coef=0.5, placement="loss", estimator="abs"))
    off_rewards, _ = penalty.begin_step(LEARNER, ROLLOUT, MASK)
    assert (off_rewards == 0).all()
    expected = [[0.5 * math.log(4), 0.5 * math.log(4)], [0.5 * math.log(1.5), 0]]
    torch.testing.assert_close(penalty.loss_of_tokens(LEARNER, ROLLOUT, MASK), torch.tensor(expected))


def test_the_loss_uses_the_coefficient_that_the_step_began_with():
    penalty = KLPenalty(KLSettings(coef=1.0, placement="loss", estimator="abs", target=0.01, horizon=10))
    _, coef = penalty.begin_step(LEARNER, ROLLOUT, MASK)
    penalty.end_step()
    assert coef == 1.0
    assert penalty.coef == pytest.approx(1.04)
    assert float(penalty.loss_of_tokens(LEARNER, ROLLOUT, MASK)[1, 0]) == pytest.approx(math.log(1.5))
    assert penalty.begin_step(LEARNER, ROLLOUT, MASK)[1] == pytest.approx(1.04)


def test_the_estimator_without_a_gradient_is_no_loss():
    with pytest.raises(ValidationError, match="estimator=k1 in the loss has a mean gradient of zero"):
        KLSettings(placement="loss")
