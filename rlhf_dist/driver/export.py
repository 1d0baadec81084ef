"""A trained policy with its tokenizer in one Hugging Face folder, and its adapters in another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_dist.cluster.events import Events
from rlhf_dist.cluster.learner_group import LearnerGroup
from rlhf_dist.cluster.rank_group import RankGroup
from rlhf_dist.durable import sync_folder, sync_tree
from rlhf_dist.engines.loading import load_tokenizer
from rlhf_dist.errors import StorageError


def export_policy(ranks: RankGroup, events: Events, folder: Path, *, tokenizer_of: str) -> None:
    """Write the ranks' policy and a tokenizer; the folder appears whole, in place of an older one.

    Args:
        tokenizer_of: the checkpoint that training started from.

    Raises:
        StorageError: it cannot be written.
    """
    tokenizer = load_tokenizer(tokenizer_of, "policy")
    with _whole(folder) as temporary:
        ranks.export_policy(events, temporary)
        try:
            tokenizer.save_pretrained(temporary)
        except Exception as error:  # `tokenizers` has no other class for a disk that is full
            raise StorageError(f"the tokenizer cannot be written ({error})") from error


def export_adapters(ranks: LearnerGroup, events: Events, folder: Path) -> None:
    """Write the adapters of the ranks' policy; the folder appears whole, in place of an older one.

    Raises:
        StorageError: it cannot be written.
    """
    with _whole(folder) as temporary:
        ranks.export_adapters(events, temporary)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write, which takes the place of `folder`, and is on disk, when the block ends."""
    discard_half_export(folder)
    temporary = _half_export(folder)
    try:
        yield temporary
        sync_tree(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, StorageError) as error:
        discard_half_export(folder)
        raise StorageError(
            f"{folder} cannot be written: {error}; make room there, or let the run write there, then go on "
            "with --resume"
        ) from error


def discard_half_export(folder: Path) -> None:
    """Delete what an export that did not end had written so far."""
    shutil.rmtree(_half_export(folder), ignore_errors=True)


def _half_export(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")
