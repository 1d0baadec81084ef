"""What a chaos run cost, by role: how long until a loss was noticed and made good, and which samples it took.

Times are measured from outside: from the blow to the line of `events.jsonl` that says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from invariants import Toll
from kills import BLOWS, METHODS, Blow, Role
from shape import START_TIMEOUT_S
from strikes import Disturbed, Strike, time_of

from rlhf_dist.experience.journal import open_journal

NOTICED_WITHIN_S = START_TIMEOUT_S + 10
"""A loss that was noticed later than this after a blow was another one's."""
HEADINGS = (
    "role",
    "kills",
    "detected in s",
    "recovered in s",
    "steps replayed",
    "samples generated again",
    "samples lost",
    "samples doubled",
)


@dataclass(frozen=True)
class Outcome:
    """What one blow did."""

    run: str
    """Whatever tells its run from others."""
    role: Role
    blow: Blow
    detected_s: float | None
    """From the blow to the event `lost`. None: it hit something that was being replaced anyway, or whoever
    started the command again saw it."""
    recovered_s: float | None
    """From the blow until the role worked again."""
    replayed_steps: int = 0
    generated_again: int = 0
    """Samples of prompts that had been handed out before."""
    lost: int = 0
    """Of the whole run that the blow was part of."""
    doubled: int = 0


def outcomes(
    name: str, run: Disturbed, toll: Toll, *, prompts_ahead: int, samples_per_prompt: int
) -> list[Outcome]:
    """One for each blow of a run, in their order.

    Args:
        name: of the run, which no other one has.
        prompts_ahead: that may be handed out while a policy version is served, beyond the steps before it.
    """
    unclaimed = [event for event in run.events if event["event"] in ("lost", "recovered")]
    recovered = [event for event in unclaimed if event["event"] == "recovered"]
    found = []
    for index, strike in enumerate(run.strikes):
        if strike.kill.ends_the_run:
            outcome = _of_a_restart(name, run, strike, prompts_ahead)
        else:
            ends = [later.at for later in run.strikes[index:] if later.kill.ends_the_run]
            driver_ends_at = min(ends, default=math.inf)
            outcome = _of_a_replacement(
                name, strike, unclaimed, recovered, samples_per_prompt, driver_ends_at=driver_ends_at
            )
        found.append(replace(outcome, lost=toll.lost, doubled=toll.doubled))
    return found


def _of_a_replacement(
    name: str,
    strike: Strike,
    unclaimed: list[dict[str, Any]],
    recovered: list[dict[str, Any]],
    samples_per_prompt: int,
    *,
    driver_ends_at: float,
) -> Outcome:
    kill = strike.kill
    until = strike.at + NOTICED_WITHIN_S
    mine = [each for each in recovered if each["role"] == kill.role and time_of(each) > strike.at]
    if mine and kill.role in ("queue", "learner"):
        until = time_of(mine[0])  # it is one: whatever was noticed later is another loss
    until = min(until, driver_ends_at)  # and the next driver notices other losses
    lost = next(
        (
            each
            for each in unclaimed
            if (each["event"], each["role"]) == ("lost", kill.role) and strike.at < time_of(each) < until
        ),
        None,
    )
    if lost is None:  # whatever it was part of was being replaced: that goes on with it
        return Outcome(name, kill.role, kill.blow, None, time_of(mine[0]) - strike.at if mine else None)
    unclaimed.remove(lost)
    back = next(
        (each for each in mine if each in unclaimed and time_of(each) > time_of(lost) and _same(each, lost)),
        None,
    )
    if back is not None:
        unclaimed.remove(back)
    return Outcome(
        name,
        kill.role,
        kill.blow,
        time_of(lost) - strike.at,
        None if back is None else time_of(back) - strike.at,
        replayed_steps=0 if back is None else back["replayed_steps"],
        generated_again=0 if back is None else back["dispatched_again"] * samples_per_prompt,
    )


def _same(recovered: dict[str, Any], lost: dict[str, Any]) -> bool:
    """Whether it is about the same worker. The learner's ranks are one."""
    return lost["role"] == "learner" or recovered["worker"] == lost["worker"]


def _of_a_restart(name: str, run: Disturbed, strike: Strike, prompts_ahead: int) -> Outcome:
    """Samples count as generated again if their prompt may have been handed out before the blow, and an
    engine got it (once more) afterwards."""
    kill = strike.kill
    num_handed_out = (strike.newest_version + 1) * prompts_ahead
    columns = ("ordinal", "submitted_at")
    rows = [row for _, batch in open_journal(run.folder).batches(columns) for row in batch.to_pylist()]
    again = [row for row in rows if row["ordinal"] < num_handed_out and _seconds(row) > strike.at]
    return Outcome(name, kill.role, kill.blow, None, strike.back_after_s, generated_again=len(again))


def _seconds(row: dict[str, Any]) -> float:
    submitted_at: datetime = row["submitted_at"]
    return submitted_at.timestamp()


def table(found: Iterable[Outcome]) -> list[tuple[str, ...]]:
    """A row for each role and kind of blow, without the headings."""
    groups: dict[tuple[Role, Blow], list[Outcome]] = {}
    for outcome in found:
        groups.setdefault((outcome.role, outcome.blow), []).append(outcome)
    order = [(role, blow) for role in METHODS for blow in dict.fromkeys(BLOWS[role])]
    return [_row(*key, groups[key]) for key in order if key in groups]


def _row(role: Role, blow: Blow, group: Sequence[Outcome]) -> tuple[str, ...]:
    tolls = {each.run: (each.lost, each.doubled) for each in group}
    return (
        role if blow == "SIGKILL" else f"{role} ({blow})",
        str(len(group)),
        _spread([each.detected_s for each in group]),
        _spread([each.recovered_s for each in group]),
        str(sum(each.replayed_steps for each in group)),
        str(sum(each.generated_again for each in group)),
        str(sum(lost for lost, _ in tolls.values())),
        str(sum(doubled for _, doubled in tolls.values())),
    )


def _spread(seconds: Sequence[float | None]) -> str:
    """Median and maximum."""
    known = [each for each in seconds if each is not None]
    return f"{statistics.median(known):.1f} (max {max(known):.1f})" if known else "-"


def as_markdown(found: Iterable[Outcome]) -> list[str]:
    """The table's lines."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *table(found)]
    return [f"| {' | '.join(row)} |" for row in rows]


def as_json(found: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Every outcome."""
    return [asdict(outcome) for outcome in found]
