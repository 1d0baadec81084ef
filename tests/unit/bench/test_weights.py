"""The bench of weights prints what it has measured, whatever fails after it."""

from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
from rich.console import Console

from rlhf_dist.bench import weights
from rlhf_dist.errors import StorageError

ROUND = weights.Round(
    memcpy_s=1.0, learner_write_s=2.0, learner_probe_s=3.0, load_s=4.0, worker_probe_s=5.0, total_s=67.0
)


def test_what_was_measured_is_printed_where_the_file_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("a full disk")

    monkeypatch.setattr(weights, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(weights, "_write_model", lambda *_: None)
    monkeypatch.setattr(weights, "_measure", lambda *_: weights.Case(10**7, 1, ROUND, [ROUND]))
    monkeypatch.setattr(weights, "write_results", refuse)
    printed = io.StringIO()
    with pytest.raises(StorageError, match="a full disk"):
        weights.measure_weights(
            [(10, 1), (100, 1)],
            rounds=1,
            gpus_per_worker=0,
            transport="auto",
            out=tmp_path / "a.json",
            console=Console(file=printed, width=120),
            verbose=False,
        )
    assert "67,000 ms" in printed.getvalue()
