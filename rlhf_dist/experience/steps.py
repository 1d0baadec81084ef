"""The log of decisions, `steps.jsonl`: which samples went to which learner step, and what became of prompts.

One writer, the process that holds the ledger. A line is an object with the key `event`:

    started   samples_per_prompt, max_staleness            a ledger begins, or goes on
    leased    step, ordinals, samples, oldest_version      before the learner sees them; `samples` is
                                                           [[segment, batch, [row, ...]], ...]
    trained   step, policy_digest                          the optimizer step is done
    dropped   reason, samples                              they will not be trained; `samples` is
                                                           [[ordinal, sample, attempt], ...]
    failed    ordinal, reasons                             a prompt is given up; a reason for each attempt
                                                           that was lost, and why it was given up
    served    worker, version, max_abs_difference,         a rollout worker proved a policy version
              proved_at_us

Once leased, a step has those samples for ever: after a crash it is repeated with exactly them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_dist.durable import JsonLinesLog, Record, read_json_lines
from rlhf_dist.errors import RunError
from rlhf_dist.types import BatchPlace, BatchRows, SampleInfo

STEPS_FILE = "steps.jsonl"


class StepsLog:
    """Writes the log of a journal folder."""

    def __init__(self, folder: Path, *, wait_s: float = 0.0) -> None:
        """Open it to go on at its end. Arguments and errors as of `JsonLinesLog`."""
        self._lines = JsonLinesLog(folder / STEPS_FILE, wait_s=wait_s)

    def append(self, records: Iterable[Record]) -> None:
        """Records, such as those of `Ledger.take_records`; on disk when this returns."""
        self._lines.append(records)

    def close(self) -> None:
        """Let another process write it."""
        self._lines.close()


@dataclass
class LearnerStep:
    """What the log says of one learner step."""

    step: int
    ordinals: tuple[int, ...]
    """Ascending."""
    samples: tuple[BatchRows, ...]
    oldest_version: int
    max_staleness: int
    """The limit that it was leased under."""
    trained: bool = False
    policy_digest: str | None = None
    """Of the policy after the step, where the learner gave one."""


@dataclass
class StepHistory:
    """What a whole log says."""

    samples_per_prompt: int | None = None
    """None: no ledger ever began."""
    max_staleness: int = 0
    """The limit that steps are leased under from here on."""
    steps: dict[int, LearnerStep] = field(default_factory=dict)
    failed: dict[int, list[str]] = field(default_factory=dict)
    """By ordinal: why."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples by reason."""
    stale: set[tuple[int, int, int]] = field(default_factory=set)
    """(ordinal, sample, attempt) of those that were dropped because they were too old."""
    served: list[Record] = field(default_factory=list)
    num_torn_bytes: int = 0


def read_history(folder: Path) -> StepHistory:
    """Read the log of a journal folder; a torn last line does not count.

    Raises:
        RunError: a line before the last is broken, or lacks what it must have.
    """
    path = folder / STEPS_FILE
    lines = read_json_lines(path)
    history = history_of(lines.records, name=str(path))
    history.num_torn_bytes = lines.num_torn_bytes
    return history


def history_of(records: Iterable[Record], *, name: str = STEPS_FILE) -> StepHistory:
    """What the records of a log say, taken together.

    Args:
        name: of the log, for what is raised.

    Raises:
        RunError: a record lacks what it must have.
    """
    history = StepHistory()
    for number, record in enumerate(records, start=1):
        try:
            _add(record, history)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{name} has a record that is none (line {number}, {type(error).__name__}: {error}): it was "
                "changed, or another version wrote it"
            ) from error
    return history


def _add(record: Record, history: StepHistory) -> None:
    match record["event"]:
        case "started":
            history.samples_per_prompt = record["samples_per_prompt"]
            history.max_staleness = record["max_staleness"]
        case "leased":
            history.steps[record["step"]] = _learner_step(record, history.max_staleness)
        case "trained":
            history.steps[record["step"]].trained = True
            history.steps[record["step"]].policy_digest = record["policy_digest"]
        case "dropped":
            history.dropped[record["reason"]] += len(record["samples"])
            if record["reason"] == "stale":
                history.stale.update((o, s, a) for o, s, a in record["samples"])
        case "failed":
            history.failed[record["ordinal"]] = record["reasons"]
        case "served":
            history.served.append(record)


def started_record(*, samples_per_prompt: int, max_staleness: int) -> Record:
    """A ledger begins, or goes on."""
    return {"event": "started", "samples_per_prompt": samples_per_prompt, "max_staleness": max_staleness}


def leased_record(
    step: int, ordinals: Sequence[int], samples: Iterable[BatchRows], oldest_version: int
) -> Record:
    """A step has its samples."""
    return {
        "event": "leased",
        "step": step,
        "ordinals": list(ordinals),
        "samples": [[place.segment, place.batch, list(rows)] for place, rows in samples],
        "oldest_version": oldest_version,
    }


def trained_record(step: int, policy_digest: str | None) -> Record:
    """A step's optimizer updates are done."""
    return {"event": "trained", "step": step, "policy_digest": policy_digest}


def dropped_record(reason: str, samples: Iterable[SampleInfo]) -> Record:
    """Samples that will not be trained."""
    keys = [[info.ordinal, info.sample, info.attempt] for info in samples]
    return {"event": "dropped", "reason": reason, "samples": keys}


def failed_record(ordinal: int, reasons: Sequence[str]) -> Record:
    """A prompt is given up."""
    return {"event": "failed", "ordinal": ordinal, "reasons": list(reasons)}


def _learner_step(record: Record, max_staleness: int) -> LearnerStep:
    return LearnerStep(
        step=record["step"],
        ordinals=tuple(record["ordinals"]),
        samples=tuple(
            BatchRows(BatchPlace(segment, batch), tuple(rows)) for segment, batch, rows in record["samples"]
        ),
        oldest_version=record["oldest_version"],
        max_staleness=max_staleness,
    )
