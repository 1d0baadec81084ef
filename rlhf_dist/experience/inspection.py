"""What a run's journal says of it: that each prompt was trained once and no token was too old, or not."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rlhf_dist.durable import Record, read_json_lines
from rlhf_dist.experience.dead_letter import DEAD_LETTER_FILE
from rlhf_dist.experience.journal import JournalReader, TornTail, open_journal
from rlhf_dist.experience.steps import STEPS_FILE, LearnerStep, StepHistory, read_history
from rlhf_dist.types import BatchPlace

MAX_LISTED = 20
"""Ordinals or steps that are listed one by one."""


@dataclass(frozen=True)
class ServedVersion:
    """A policy version and the workers that proved it."""

    version: int
    num_workers: int
    max_abs_difference: float
    """The largest, in nats."""


@dataclass(frozen=True)
class Inspection:
    """The numbers of a journal. Lists of ordinals and steps are ascending."""

    num_steps_trained: int
    num_steps_leased: int
    """Given their samples and not trained yet."""
    num_ordinals_trained: int
    missing: list[int]
    """Ordinals below the highest trained one that neither a step has nor were given up. Must be empty where
    every step was leased under `max_staleness` 0; others may still be under way."""
    doubled: list[int]
    """Ordinals with a sample that was trained more than once: must be empty."""
    failed: dict[int, list[str]]
    """Ordinals that were given up, and why: a reason for each attempt that was lost, and the last ones."""
    dead_letters: str | None
    """The file with the prompts of those; None: there is none."""
    samples_dropped: dict[str, int]
    """By reason."""
    samples_by_version: dict[int, int]
    """Trained samples by the policy version of their oldest token, as far as the journal still has them."""
    staleness_max: int | None
    """Steps that the oldest token of a trained sample was behind; None: nothing was trained."""
    staleness_mean: float | None
    """Over the samples of `samples_by_version`."""
    max_staleness: int | None
    """The limit that the last step was leased under."""
    is_synchronous: bool
    """Whether every step was leased under a limit of 0, and so in the order of the prompts."""
    stale_steps: list[int]
    """Steps trained on a sample that was older than the limit: must be empty."""
    absent_steps: list[int]
    """Steps before the log's last one that it does not have, and such as are done by what else the run has
    written, and not by the log: must be empty."""
    lost_steps: list[int]
    """Steps with samples that the journal ought to hold and does not, or not whole: must be empty."""
    num_steps_deleted: int
    """Trained steps with samples that were deleted to keep the journal small."""
    damaged: list[str]
    """Batches, by segment and number, and archives that are no longer as they were written: must be empty."""
    has_log: bool
    """Whether the log of decisions is there."""
    served: list[ServedVersion]
    num_segments: int
    num_archives: int
    num_bytes: int
    torn_bytes: dict[str, int]
    """Of each file that ends in something never wholly written, which does not count."""

    @property
    def violations(self) -> list[str]:
        """What must not be, in words."""
        found = []
        if self.missing and self.is_synchronous:
            found.append(f"passed over, though training was synchronous: {_listed(self.missing)}")
        if self.doubled:
            found.append(f"trained more than once: {_listed(self.doubled)}")
        if self.stale_steps:
            found.append(f"steps with samples older than their limit: {_listed(self.stale_steps)}")
        if self.absent_steps:
            found.append(f"steps that {STEPS_FILE} has lost: {_listed(self.absent_steps)}")
        if self.lost_steps:
            found.append(f"steps whose samples the journal has lost: {_listed(self.lost_steps)}")
        if self.damaged:
            found.append(f"no longer as they were written: {_listed(self.damaged)}")
        if not self.has_log:
            found.append(f"there are samples and no {STEPS_FILE}, which says what became of them")
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return asdict(self) | {"violations": self.violations}


def inspect_run(run_folder: Path, *, reported: Iterable[int] = ()) -> Inspection:
    """Read the whole journal of a run, which may be going on.

    Args:
        reported: steps that are done by what else the run has written, read before this is called; see
            `driver.starting_point.reported_steps`.

    Raises:
        RunError: the folder has no journal, or it is broken.
    """
    journal = open_journal(run_folder)
    history = read_history(journal.folder)
    letters = journal.folder / DEAD_LETTER_FILE
    steps = [step for _, step in sorted(history.steps.items())]
    trained = [step for step in steps if step.trained]
    absent = set(range(max(history.steps, default=0))) - history.steps.keys()
    absent |= set(reported) - {step.step for step in trained}
    tails = journal.torn_tails()
    damaged = sorted({*journal.damaged(), *_cut_off(journal, tails, steps)})
    samples = _TrainedSamples(journal, steps, damaged)
    ordinals = {ordinal for step in trained for ordinal in step.ordinals}
    settled = {o for step in steps for o in step.ordinals} | set(history.failed)
    oldest = {step.step: samples.oldest_version(step) for step in trained}
    return Inspection(
        num_steps_trained=len(trained),
        num_steps_leased=len(history.steps) - len(trained),
        num_ordinals_trained=len(ordinals),
        missing=sorted(set(range(max(ordinals, default=0))) - settled),
        doubled=samples.doubled(),
        failed=dict(sorted(history.failed.items())),
        dead_letters=str(letters) if letters.exists() else None,
        samples_dropped=dict(sorted(history.dropped.items())),
        samples_by_version=samples.by_version(),
        staleness_max=max((step - version for step, version in oldest.items()), default=None),
        staleness_mean=samples.mean_staleness(),
        max_staleness=trained[-1].max_staleness if trained else None,
        is_synchronous=not any(step.max_staleness for step in steps),
        stale_steps=[step.step for step in trained if step.step - oldest[step.step] > step.max_staleness],
        absent_steps=sorted(absent),
        lost_steps=samples.lost_steps,
        num_steps_deleted=samples.num_deleted,
        damaged=[
            *(path.name for path in sorted(journal.damaged_archives)),
            *(f"{place.segment} batch {place.batch}" for place in damaged),
        ],
        has_log=history.samples_per_prompt is not None or not (journal.segments() or journal.archives()),
        served=_served(history),
        num_segments=len(journal.segments()),
        num_archives=len(journal.archives()),
        num_bytes=journal.num_bytes(),
        torn_bytes=_torn_bytes(journal, history, tails, {place.segment for place in damaged}),
    )


class _TrainedSamples:
    """Columns of the samples that were trained, of those steps whose batches the journal still has."""

    def __init__(
        self, journal: JournalReader, steps: Iterable[LearnerStep], damaged: Container[BatchPlace]
    ) -> None:
        columns = {place: _numbers(batch) for place, batch in journal.batches(_COLUMNS, without=damaged)}
        deleted = journal.deleted_segments()
        self.lost_steps: list[int] = []
        """Also such as are only leased."""
        self.num_deleted = 0
        """Steps with samples that were deleted to keep the journal small."""
        self._gone: list[LearnerStep] = []
        self._samples: dict[int, np.ndarray] = {}
        """By step, [samples, 3]: ordinal, sample, oldest version."""
        for step in steps:
            gone = {place.segment for place, _ in step.samples if place not in columns}
            if gone - deleted:
                self.lost_steps.append(step.step)
            elif gone:
                self.num_deleted += 1
            if not step.trained:
                continue
            if gone:
                self._gone.append(step)
            else:
                rows = [columns[place][list(rows)] for place, rows in step.samples]
                self._samples[step.step] = np.concatenate(rows) if rows else _NO_SAMPLES

    def oldest_version(self, step: LearnerStep) -> int:
        """By the samples themselves, where they are still there."""
        samples = self._samples.get(step.step, _NO_SAMPLES)
        return int(samples[:, 2].min()) if len(samples) else step.oldest_version

    def doubled(self) -> list[int]:
        all_samples = np.concatenate([_NO_SAMPLES, *self._samples.values()])
        keys, counts = np.unique(all_samples[:, :2], axis=0, return_counts=True)
        doubled = set(keys[counts > 1, 0].tolist())
        seen = set(keys[:, 0].tolist())
        for step in self._gone:
            doubled |= seen.intersection(step.ordinals)
            seen |= set(step.ordinals)
        return sorted(doubled)

    def by_version(self) -> dict[int, int]:
        versions = np.concatenate([_NO_SAMPLES, *self._samples.values()])[:, 2]
        values, counts = np.unique(versions, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def mean_staleness(self) -> float | None:
        ages = [step - samples[:, 2] for step, samples in self._samples.items()]
        return float(np.concatenate(ages).mean()) if sum(map(len, ages)) else None


_COLUMNS = ("ordinal", "sample", "oldest_version")
_NO_SAMPLES = np.empty((0, len(_COLUMNS)), np.int64)


def _numbers(batch: pa.RecordBatch) -> np.ndarray:
    """[rows, 3]"""
    return np.stack([column.to_numpy().astype(np.int64) for column in batch.columns], axis=1)


def _served(history: StepHistory) -> list[ServedVersion]:
    by_version: dict[int, list[Record]] = {}
    for record in history.served:
        by_version.setdefault(record["version"], []).append(record)
    return [
        ServedVersion(
            version,
            len({record["worker"] for record in records}),
            max(record["max_abs_difference"] for record in records),
        )
        for version, records in sorted(by_version.items())
    ]


def _cut_off(
    journal: JournalReader, tails: Iterable[TornTail], steps: Iterable[LearnerStep]
) -> list[BatchPlace]:
    """Batches that steps have, and that were whole then: what their segments end in now was damaged."""
    whole = {tail.segment: journal.num_batches(tail.segment) for tail in tails}
    places = {place for step in steps for place, _ in step.samples}
    return [place for place in places if place.segment in whole and place.batch >= whole[place.segment]]


def _torn_bytes(
    journal: JournalReader, history: StepHistory, tails: Iterable[TornTail], damaged_segments: Container[str]
) -> dict[str, int]:
    torn = {tail.segment: tail.num_bytes for tail in tails if tail.segment not in damaged_segments}
    num_torn = {
        STEPS_FILE: history.num_torn_bytes,
        DEAD_LETTER_FILE: read_json_lines(journal.folder / DEAD_LETTER_FILE).num_torn_bytes,
    }
    return torn | {name: num_bytes for name, num_bytes in num_torn.items() if num_bytes}


def print_inspection(console: Console, found: Inspection) -> None:
    """The numbers for a person."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in _lines(found):
        table.add_row(name, value)
    console.print(table, highlight=False)
    for violation in found.violations:
        console.print(f"violated: {violation}", style="bold red", highlight=False)


def _lines(found: Inspection) -> Iterable[tuple[str, str]]:
    yield "learner steps", f"{found.num_steps_trained} trained, {found.num_steps_leased} under way"
    yield "prompts trained", f"{found.num_ordinals_trained}"
    yield "missing", _listed(found.missing)
    yield "doubled", _listed(found.doubled)
    where = f" (why: {found.dead_letters})" if found.failed and found.dead_letters else ""
    yield "failed", _listed(list(found.failed)) + where
    yield "samples dropped", _pairs(found.samples_dropped)
    if found.num_steps_deleted:
        yield "deleted to save room", f"samples of {found.num_steps_deleted} steps"
    yield "samples by version", _pairs(found.samples_by_version)
    if found.staleness_max is not None:
        mean = "" if found.staleness_mean is None else f", mean {found.staleness_mean:.2f}"
        limit = f"(limit {found.max_staleness})"
        yield "oldest token", f"at most {found.staleness_max} steps behind{mean} {limit}"
    for served in found.served[-MAX_LISTED:]:
        yield (
            f"version {served.version}",
            f"proved by {served.num_workers} workers, within {served.max_abs_difference:.1e} nats",
        )
    yield (
        "journal",
        f"{found.num_segments} segments, {found.num_archives} archives, {found.num_bytes / 1e6:.1f} MB",
    )
    if found.torn_bytes:
        yield "torn ends, not counted", _pairs({f: f"{n} bytes" for f, n in found.torn_bytes.items()})


def _listed(numbers: Sequence[int | str]) -> str:
    if not numbers:
        return "none"
    rest = ", …" if len(numbers) > MAX_LISTED else ""
    return f"{len(numbers)}: {', '.join(map(str, numbers[:MAX_LISTED]))}{rest}"


def _pairs(values: dict[Any, Any]) -> str:
    entries = list(values.items())
    rest = ["…"] if len(entries) > MAX_LISTED else []
    return ", ".join(rest + [f"{key}: {value}" for key, value in entries[-MAX_LISTED:]]) or "none"
