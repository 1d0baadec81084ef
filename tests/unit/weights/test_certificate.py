"""The proof that a worker serves the learner's weights: what passes, what fails, and with which words."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Probe
from rlhf_dist.weights.certificate import PROBE_NUM_TOKENS, TOLERANCE_NATS, probe_tokens, prove

PROBE = Probe(tokens=(5, 6, 7, 8), logprobs=(-1.0, -2.0, -3.0))
finite = st.floats(-50, 0)


def proof(logprobs, *, tolerance_nats=1e-4, probe=PROBE):
    return prove("rollout worker 1", 12, probe, logprobs, tolerance_nats)


# ---------------------------------------------------------------------------------------------- prove


def test_equal_log_probabilities_prove_it_with_difference_zero():
    assert proof([-1.0, -2.0, -3.0]) == 0.0


def test_a_difference_within_the_tolerance_is_returned():
    assert proof([-1.0, -2.25, -3.125], tolerance_nats=0.5) == 0.25


def test_a_difference_of_exactly_the_tolerance_passes():
    assert proof([-1.0, -2.25, -3.0], tolerance_nats=0.25) == 0.25


def test_a_difference_above_the_tolerance_names_worker_version_place_and_both_numbers():
    with pytest.raises(WeightsError) as caught:
        proof([-1.0, -2.5, -3.1], tolerance_nats=0.25)
    message = str(caught.value)
    assert message.startswith(
        "rollout worker 1 does not serve the weights of policy version 12: for probe token 2 it gives "
        "log-probability -2.500000, the learner -2.000000 (difference 5.00e-01 nats, allowed 2e-01)."
    )


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_number_that_is_not_finite_never_proves_anything(number, place):
    served = [-1.0, -2.0, -3.0]
    served[place] = number
    with pytest.raises(
        WeightsError, match=f"for probe token {place + 1} it gives log-probability {number:.6f}"
    ):
        proof(served, tolerance_nats=math.inf if math.isnan(number) else 1e9)


def test_a_learner_that_published_nan_is_not_proved_by_a_worker_that_gives_nan():
    broken = Probe(tokens=(5, 6, 7), logprobs=(math.nan, -2.0))
    with pytest.raises(WeightsError, match="for probe token 1 it gives log-probability nan, the learner nan"):
        proof([math.nan, -2.0], probe=broken, tolerance_nats=1e9)


def test_two_equal_infinities_are_no_proof():
    broken = Probe(tokens=(5, 6, 7), logprobs=(-math.inf, -2.0))
    with pytest.raises(WeightsError, match="for probe token 1"):
        proof([-math.inf, -2.0], probe=broken, tolerance_nats=1e9)


@pytest.mark.parametrize("served", [[], [-1.0, -2.0], [-1.0, -2.0, -3.0, -4.0]])
def test_a_wrong_number_of_log_probabilities_is_counted(served):
    message = (
        f"^rollout worker 1 answered the probe of policy version 12 with {len(served)} log-probabilities, "
        "the learner published 3$"
    )
    with pytest.raises(WeightsError, match=message):
        proof(served)


def test_an_empty_probe_proves_nothing():
    with pytest.raises(WeightsError, match="policy version 12 has no token to compare, so rollout worker 1"):
        proof([], probe=Probe(tokens=(5,), logprobs=()))


def test_the_test_tolerance_tells_float32_noise_from_a_changed_weight():
    tolerance = TOLERANCE_NATS["float32"]
    assert proof([-1.0 + 2e-6, -2.0, -3.0 - 2e-6], tolerance_nats=tolerance) == pytest.approx(2e-6, rel=1e-6)
    with pytest.raises(WeightsError):
        proof([-1.0, -2.0 + 2e-4, -3.0], tolerance_nats=tolerance)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.floats(1e-6, 30))
def test_it_passes_if_and_only_if_the_largest_difference_is_allowed(pairs, tolerance_nats):
    served, published = (list(side) for side in zip(*pairs, strict=True))
    probe = Probe(tokens=tuple(range(len(pairs) + 1)), logprobs=tuple(published))
    largest = max(abs(one - other) for one, other in pairs)
    if largest <= tolerance_nats:
        assert proof(served, probe=probe, tolerance_nats=tolerance_nats) == largest
    else:
        with pytest.raises(WeightsError):
            proof(served, probe=probe, tolerance_nats=tolerance_nats)


# --------------------------------------------------------------------------------------- probe_tokens


def test_the_probe_is_the_same_in_every_process():
    code = "from rlhf_dist.weights.certificate import probe_tokens; print(probe_tokens(32000, 1024))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == repr(probe_tokens(32_000, 1024))
    np.random.seed(1)
    assert probe_tokens(32_000, 1024) == probe_tokens(32_000, 1024)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300_000), st.integers(2, 5_000))
def test_the_probe_fits_vocabulary_and_context(vocab_size, context_tokens):
    tokens = probe_tokens(vocab_size, context_tokens)
    assert len(tokens) == min(PROBE_NUM_TOKENS, context_tokens - 1)
    assert all(type(token) is int and 0 <= token < vocab_size for token in tokens)


def test_the_probe_is_spread_over_the_vocabulary():
    tokens = probe_tokens(1000, 1024)
    assert len(tokens) == 16
    assert len(set(tokens)) > 12
    assert min(tokens) < 200
    assert max(tokens) > 800


def test_a_longer_context_does_not_change_the_first_tokens():
    assert probe_tokens(500, 9) == probe_tokens(500, 2048)[:8]
