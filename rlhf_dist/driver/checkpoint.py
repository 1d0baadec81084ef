"""Checkpoints: written beside, synced, renamed; the old ones go only afterwards.

    step-000020/             the learner goes on with step 20
        policy/, value/      parameters, Adam moments, places in the schedules: `engines.training_state`
        algorithm.pt         the algorithm's own state
        state.json           what wrote it, and how it scored
        digests.json         size and digest of every other file; written last

A folder has such a name only once everything in it is on disk. What begins with a dot is half-made, or half
gone. `best-000020` is a copy of a checkpoint for whoever wants the best one; a run goes on from it only where
newer checkpoints are damaged (`revive_best`).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_dist.config import CheckpointSettings, Config
from rlhf_dist.driver.run_folder import write_json
from rlhf_dist.durable import sync_folder
from rlhf_dist.engines.checkpoint_files import digest_of
from rlhf_dist.errors import ConfigError, StorageError
from rlhf_dist.observability.metrics import Metrics
from rlhf_dist.types import FileDigest

PREFIX, BEST_PREFIX = "step-", "best-"
STATE_FILE, DIGESTS_FILE = "state.json", "digests.json"
MB = 1e6
REMEDY = (
    "make room there (a lower checkpoint.keep_last and checkpoint.best_metric=null take less), or let "
    "the run write there, then go on with --resume"
)

Save = Callable[[Path], dict[str, FileDigest]]
"""Writes the learner's part into a folder; returns what, by the path in it."""


@dataclass(frozen=True)
class Score:
    """What a checkpoint is compared by: a metric of the step before it."""

    metric: str
    value: float


@dataclass(frozen=True)
class RunState:
    """Where a run stands between two steps, besides the learner's own state."""

    next_step: int
    algorithm: str
    lora: dict[str, Any] | None
    """The section `learner.lora`."""
    num_ranks: int
    """That wrote it; any number can go on from it."""
    zero_stage: int
    """That wrote it; any other can go on from it."""
    score: Score | None = None
    """None: it has none, and is not the best."""


def state_before(next_step: int, config: Config, metrics: Metrics) -> RunState:
    """The state of a run before a step.

    Args:
        metrics: of the step that was done last.
    """
    return RunState(
        next_step,
        algorithm=config.algorithm.name,
        lora=_lora_of(config),
        num_ranks=config.learner.num_workers,
        zero_stage=config.learner.zero_stage,
        score=_score(config.checkpoint.best_metric, metrics),
    )


def why_no_score(state: RunState, config: Config, metrics: Metrics) -> str | None:
    """What to tell the user of a checkpoint that was to have a score and has none."""
    metric = config.checkpoint.best_metric
    if metric is None or state.score is not None:
        return None
    if metric in metrics:
        return f"checkpoint.best_metric: {metric} of step {state.next_step - 1} is no finite number"
    near = difflib.get_close_matches(metric, metrics, n=1)
    return (
        f"checkpoint.best_metric: step {state.next_step - 1} reported no {metric}"
        f"{f'; did you mean {near[0]}?' if near else ''}"
    )


def save_checkpoint(folder: Path, save: Save, state: RunState, settings: CheckpointSettings) -> Path:
    """Write a checkpoint, then remove those that are not kept, and keep a copy of the best.

    Raises:
        StorageError: it cannot be written, and nothing is left of it; or it is there, and older ones cannot
            be removed or the best one cannot be copied. Those that are to be kept are as they were.
    """
    final = folder / f"{PREFIX}{state.next_step:06d}"
    temporary = _hidden(final, "new")
    with _failing(folder, partial(_cannot_save, folder, state.next_step)):
        folder.mkdir(parents=True, exist_ok=True)
        _clean_up(folder)
        temporary.mkdir()
        files = save(temporary)
        _finish(temporary, files, state)
        _put(temporary, final)
    with _failing(folder, partial(_cannot_tidy, final)):
        sync_folder(folder)
        if state.score is not None:
            _keep_best(folder, final, state.score, settings.best_mode)
        _remove_old(folder, final, settings.keep_last)
    return final


@contextmanager
def _failing(folder: Path, explain: Callable[[OSError | StorageError], StorageError]) -> Iterator[None]:
    """Leave nothing half-made when the block fails, and explain a disk's errors."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            _clean_up(folder)
        if isinstance(error, OSError | StorageError):
            raise explain(error) from error
        raise


def list_checkpoints(folder: Path, *, with_best: bool = False) -> list[Path]:
    """The checkpoints that a run can go on from, oldest first; `find_damage` says whether they are whole."""
    return [path for path in named_checkpoints(folder, with_best=with_best) if (path / DIGESTS_FILE).exists()]


def named_checkpoints(folder: Path, *, with_best: bool = False) -> list[Path]:
    """Everything that has a checkpoint's name, oldest first.

    Args:
        with_best: also the copies of the best ones.
    """
    name = rf"({PREFIX}|{BEST_PREFIX})\d+" if with_best else rf"{PREFIX}\d+"
    return sorted(
        (path for path in folder.glob("*-*") if re.fullmatch(name, path.name)),
        key=lambda path: (step_of(path), path.name.startswith(PREFIX)),
    )


def best_checkpoint(folder: Path) -> Path | None:
    """The copy of the best one; None: none has a score yet."""
    found = [path for path in list_checkpoints(folder, with_best=True) if path.name.startswith(BEST_PREFIX)]
    return found[-1] if found else None  # two after a crash: the later one has replaced the other


def revive_best(best: Path) -> Path:
    """Have a copy of the best one among the checkpoints that a run goes on from; returns its name there.

    Raises:
        StorageError: it cannot be written.
    """
    checkpoint = best.with_name(best.name.replace(BEST_PREFIX, PREFIX))
    with _failing(best.parent, partial(_cannot_save, best.parent, step_of(best))):
        _copy(best, checkpoint)
    return checkpoint


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint goes on with."""
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> RunState:
    """The state beside a checkpoint."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    score = state.pop("score")
    return RunState(**state, score=None if score is None else Score(**score))


def check_state(
    checkpoint: Path, config: Config, *, otherwise: str = "set run.dir to a new folder, for a new run"
) -> RunState:
    """The state beside a checkpoint that a run is to go on from.

    Args:
        otherwise: what to do where the settings have to be other ones.

    Raises:
        ConfigError: another algorithm wrote it, or one with other adapters.
    """
    state = read_state(checkpoint)
    if state.algorithm != config.algorithm.name:
        raise ConfigError(
            f"checkpoint {checkpoint} was written by algorithm.name={state.algorithm}, and this run has "
            f"algorithm.name={config.algorithm.name}; go on from it with algorithm.name={state.algorithm}, "
            f"or {otherwise}"
        )
    if state.lora != _lora_of(config):
        theirs, ours = json.dumps(state.lora), json.dumps(_lora_of(config))
        raise ConfigError(
            f"checkpoint {checkpoint} was written with learner.lora={theirs}, and this run has "
            f"learner.lora={ours}; go on from it with learner.lora='{theirs}', or {otherwise}"
        )
    return state


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: they are what was written.

    Raises:
        FileNotFoundError: the checkpoint itself is gone, as when a run that goes on has removed it.
    """
    try:
        listed = json.loads((checkpoint / DIGESTS_FILE).read_text(encoding="utf-8"))
        files = {name: FileDigest(**entry) for name, entry in listed.items()}
        return next(_damages(checkpoint, files), None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if not checkpoint.exists():
            raise FileNotFoundError(f"checkpoint {checkpoint} is gone") from error
        if isinstance(error, FileNotFoundError):
            return f"{DIGESTS_FILE} is missing"
        if isinstance(error, OSError):
            return f"{error.filename} cannot be read ({error.strerror})"
        return f"{DIGESTS_FILE} is broken"


# ------------------------------------------------------------------------------------------------ writing


def _finish(folder: Path, files: dict[str, FileDigest], state: RunState) -> None:
    """Write what the driver adds, the digests last, and have every folder's entries on disk."""
    write_json(folder / STATE_FILE, asdict(state))
    files = files | {STATE_FILE: digest_of(folder / STATE_FILE)}
    write_json(folder / DIGESTS_FILE, {name: asdict(digest) for name, digest in sorted(files.items())})
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(path)


def _put(temporary: Path, final: Path) -> None:
    """Give a finished folder its name."""
    if final.exists():
        final.rename(_hidden(final, "old"))
    temporary.rename(final)


def _keep_best(folder: Path, checkpoint: Path, score: Score, mode: str) -> None:
    """Copy a checkpoint that scores better than the best one so far, then remove that one."""
    if not _is_better(score, _best_score(folder), mode):
        return
    best = folder / checkpoint.name.replace(PREFIX, BEST_PREFIX)
    _copy(checkpoint, best)
    for path in folder.glob(f"{BEST_PREFIX}*"):
        if path != best:
            _remove(path)


def _copy(checkpoint: Path, to: Path) -> None:
    """Another name for a checkpoint, which appears whole."""
    temporary = _hidden(to, "new")
    shutil.copytree(checkpoint, temporary, copy_function=_link)
    for path in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        sync_folder(path)
    _put(temporary, to)
    sync_folder(to.parent)


def _link(source: str, target: str) -> None:
    """One more name for a file that nobody changes; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _best_score(folder: Path) -> Score | None:
    """None: there is no best one, or it no longer says how it scored."""
    before = best_checkpoint(folder)
    try:
        return None if before is None else read_state(before).score
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_better(score: Score, best: Score | None, mode: str) -> bool:
    """Later ones win a tie. What was measured by another metric cannot be compared, and goes."""
    if best is None or best.metric != score.metric:
        return True
    return score.value >= best.value if mode == "max" else score.value <= best.value


def _remove_old(folder: Path, newest: Path, keep_last: int) -> None:
    """Remove all but the last ones. Those after the newest are of a time that the run went back before."""
    kept = [path for path in list_checkpoints(folder) if step_of(path) <= step_of(newest)][-keep_last:]
    for path in named_checkpoints(folder):
        if path not in kept:
            _remove(path)
    _clean_up(folder)


def _remove(checkpoint: Path) -> None:
    """At once for whoever looks."""
    hidden = _hidden(checkpoint, "old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _clean_up(folder: Path) -> None:
    """Delete what is half-made or half gone. A rank that was cut off may still write there: then later."""
    for prefix in (PREFIX, BEST_PREFIX):
        for path in folder.glob(f".{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def _hidden(checkpoint: Path, suffix: str) -> Path:
    """Another one each time: a rank of an earlier try, which was cut off, may still be writing."""
    return checkpoint.with_name(f".{checkpoint.name}.{suffix}-{uuid.uuid4().hex[:8]}")


def _cannot_save(folder: Path, next_step: int, error: OSError | StorageError) -> StorageError:
    whole = list_checkpoints(folder)
    kept = f"checkpoint {whole[-1].name} is whole" if whole else "there is no older one"
    return StorageError(
        f"no checkpoint can be saved before step {next_step} in {folder}, where {_free(folder)}: "
        f"{_reason(error)}; {kept}; {REMEDY}"
    )


def _cannot_tidy(checkpoint: Path, error: OSError | StorageError) -> StorageError:
    return StorageError(
        f"checkpoint {checkpoint} is written, where {_free(checkpoint.parent)}, but older ones cannot be "
        f"removed or the best one cannot be copied: {_reason(error)}; {REMEDY}"
    )


def _reason(error: OSError | StorageError) -> str:
    return str(error) if isinstance(error, StorageError) else error.strerror or str(error)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / MB:,.0f} MB are free"
    except OSError:
        return "it is not there"


# ------------------------------------------------------------------------------------------------- checks


def _damages(checkpoint: Path, files: dict[str, FileDigest]) -> Iterator[str]:
    """What is quickly found comes first."""
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (num_bytes := path.stat().st_size) != expected.num_bytes:
            yield f"{name} has {num_bytes} of {expected.num_bytes} bytes"
    for name, expected in files.items():
        if digest_of(checkpoint / name) != expected:
            yield f"{name} has other bytes than were written"


def _score(metric: str | None, metrics: Metrics) -> Score | None:
    """None: no metric is asked for, the step did not report it, or it is no finite number."""
    value = None if metric is None else metrics.get(metric)
    if metric is None or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Score(metric, float(value))


def _lora_of(config: Config) -> dict[str, Any] | None:
    lora = config.learner.lora
    return None if lora is None else lora.model_dump(mode="json")
