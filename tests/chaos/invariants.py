"""What must hold after a run, read from its folder alone, and what two runs must have in common."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file

from rlhf_dist.driver.run_folder import RunFolder
from rlhf_dist.driver.starting_point import reported_steps
from rlhf_dist.durable import read_json_lines
from rlhf_dist.experience.inspection import inspect_run
from rlhf_dist.experience.journal import JOURNAL_FOLDER, open_journal, read_table
from rlhf_dist.experience.steps import STEPS_FILE, read_history
from rlhf_dist.observability.metrics import read_metrics
from rlhf_dist.weights.certificate import TOLERANCE_NATS

TIMED = ("seconds", "tokens_per_s")
"""Beginnings of the names of metrics that no two runs have in common."""
TRAINED_COLUMNS = ("ordinal", "sample", "prompt_tokens", "response_tokens", "reward", "version_spans", "step")


@dataclass(frozen=True)
class Toll:
    """Samples of a whole run."""

    lost: int
    """That belong to the run's steps, and no step was trained on."""
    doubled: int
    """Copies beyond the first that a step was trained on."""
    needless: int
    """In the journal, and no step was trained on them."""


def check_invariants(folder: Path, *, num_samples: int) -> Toll:
    """Check the journal of a run that has ended.

    Args:
        num_samples: that all steps together are trained on.

    Raises:
        AssertionError: it broke a promise.
    """
    found = inspect_run(folder, reported=reported_steps(RunFolder(folder)))
    assert found.violations == []
    assert found.missing == []
    assert found.failed == {}
    _check_proofs(folder)
    _check_decisions(folder)
    return count_toll(folder, num_samples=num_samples)


def count_toll(folder: Path, *, num_samples: int) -> Toll:
    """Count samples by the names that the journal gives them."""
    trained = trained_samples(folder)
    keys = {(row["ordinal"], row["sample"]) for row in trained}
    written = sum(batch.num_rows for _, batch in open_journal(folder).batches(("ordinal",)))
    return Toll(
        lost=num_samples - len(keys), doubled=len(trained) - len(keys), needless=written - len(trained)
    )


def trained_samples(folder: Path) -> list[dict[str, Any]]:
    """Every row that a step was trained on, with the step; a row that two steps had is there twice."""
    journal = open_journal(folder)
    return [
        row | {"step": step.step}
        for step in read_history(journal.folder).steps.values()
        if step.trained
        for batch in journal.read_rows(step.samples)
        for row in batch.to_pylist()
    ]


def _check_proofs(folder: Path) -> None:
    """Whatever version a token is from, the worker that sampled it had proved it before the sample left it.

    A response may end in the steps of the engine that answer the probe; it is handed over after the proof.
    """
    served = read_history(folder / JOURNAL_FOLDER).served
    proved_at_us: dict[tuple[str, int], int] = {}
    for record in served:
        key = (record["worker"], record["version"])
        proved_at_us[key] = min(record["proved_at_us"], proved_at_us.get(key, record["proved_at_us"]))
    for _, batch in open_journal(folder).batches(("producer", "version_spans", "scored_at")):
        scored_at_us = batch["scored_at"].cast(pa.int64()).to_pylist()
        for row, at_us in zip(batch.to_pylist(), scored_at_us, strict=True):
            for span in row["version_spans"]:
                assert proved_at_us[row["producer"], span["version"]] <= at_us
    assert max(record["max_abs_difference"] for record in served) <= TOLERANCE_NATS["float32"]


def _check_decisions(folder: Path) -> None:
    """A step was given its samples once, and ended with the same policy each time it was trained."""
    records = read_json_lines(folder / JOURNAL_FOLDER / STEPS_FILE).records
    leased = [record["step"] for record in records if record["event"] == "leased"]
    assert leased == sorted(set(leased))
    digests: dict[int, set[str]] = {}
    for record in records:
        if record["event"] == "trained":
            digests.setdefault(record["step"], set()).add(record["policy_digest"])
    assert {step for step, policies in digests.items() if len(policies) > 1} == set()


# ------------------------------------------------------------------------------------------ the same run


def policies(folder: Path) -> dict[int, str | None]:
    """Digest of the policy after each step."""
    return {step.step: step.policy_digest for step in read_history(folder / JOURNAL_FOLDER).steps.values()}


def untimed_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every metric but the times."""
    return [
        {name: value for name, value in step.items() if not name.startswith(TIMED)}
        for step in read_metrics(folder / "metrics.jsonl")
    ]


def trained_columns(folder: Path) -> pa.Table:
    """What every step was trained on."""
    table = read_table(folder, [name for name in TRAINED_COLUMNS if name != "step"])
    trained = table.filter(table["step"].is_valid())
    return trained.sort_by([("ordinal", "ascending"), ("sample", "ascending")]).select(TRAINED_COLUMNS)


def last_checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: parameters and optimizer state."""
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        if path.suffix == ".pt":
            _flatten(name, torch.load(path, map_location="cpu", weights_only=False), tensors)
        elif path.suffix == ".safetensors":
            tensors |= {f"{name}/{key}": value for key, value in load_file(path).items()}
    return tensors


def _flatten(name: str, value: Any, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        into[name] = value
    elif isinstance(value, dict):
        for key, each in value.items():
            _flatten(f"{name}/{key}", each, into)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            _flatten(f"{name}/{number}", each, into)


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """The run ended bit for bit where the undisturbed one did.

    Raises:
        AssertionError: with what differs.
    """
    assert policies(folder) == policies(undisturbed)
    assert untimed_metrics(folder) == untimed_metrics(undisturbed)
    assert trained_columns(folder).equals(trained_columns(undisturbed))
    ours, theirs = last_checkpoint_tensors(folder), last_checkpoint_tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert folder_digests(folder / "policy") == folder_digests(undisturbed / "policy")
    assert (folder / "answers.json").read_text() == (undisturbed / "answers.json").read_text()
