"""How a rollout worker comes to serve a snapshot. Its engine is a stand-in; no cluster is started."""

from __future__ import annotations

import asyncio

import numpy as np
import pyarrow as pa
import pytest

from rlhf_dist.cluster.rollout_worker import RolloutWorker
from rlhf_dist.engines.settings import RolloutSettings
from rlhf_dist.errors import NotProvedError, WeightsError
from rlhf_dist.types import Probe, PublishedWeights, SegmentAddress, WeightManifest

PUBLISHED = PublishedWeights(
    WeightManifest(7, (), Probe((1, 2, 3), (-1.0, -2.0))),
    SegmentAddress("/nowhere", "", 1, 0),
    node="another",
    probe_s=0,
    write_s=0,
)
PAYLOAD = np.zeros(0, np.uint8)


class Engine:
    """Answers the probe as it is told to, one answer after each load."""

    def __init__(self, *answers, error=None):
        self.num_loads, self._answers, self._error = 0, answers, error

    def load_weights(self, *_):
        self.num_loads += 1
        if self._error is not None:
            raise self._error

    def prompt_logprobs(self, _):
        return self._answers[self.num_loads - 1]


def load(engine):
    worker = RolloutWorker(
        "rollout worker 0",
        RolloutSettings(),
        model="",
        dtype="float32",
        context_tokens=8,
        probe_tolerance_nats=1e-4,
        prompts=pa.table({"prompt_tokens": [[1]]}),
        seed=0,
        deterministic=True,
    )
    worker._engine = engine
    return asyncio.run(worker.load_weights(PUBLISHED, PAYLOAD))


RIGHT, WRONG = [-1.0, -2.0], [-1.0, -2.001]


def test_a_snapshot_that_is_proved_is_loaded_once():
    served = load(Engine(RIGHT))
    assert (served.version, served.num_loads, served.max_abs_difference) == (7, 1, 0.0)


def test_a_snapshot_that_is_not_proved_is_loaded_once_more():
    engine = Engine(WRONG, RIGHT)
    served = load(engine)
    assert (served.version, served.num_loads, served.max_abs_difference) == (7, 2, 0.0)
    assert engine.num_loads == 2


def test_a_snapshot_that_is_not_proved_again_is_refused():
    engine = Engine(WRONG, WRONG)
    with pytest.raises(NotProvedError, match="does not serve the weights of policy version 7"):
        load(engine)
    assert engine.num_loads == 2


def test_damaged_bytes_are_not_tried_again():
    engine = Engine(error=WeightsError("the bytes were damaged on their way"))
    with pytest.raises(WeightsError, match="damaged"):
        load(engine)
    assert engine.num_loads == 1
