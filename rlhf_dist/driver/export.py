"""A trained policy with its tokenizer in one Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_dist.cluster.rank_group import RankGroup
from rlhf_dist.engines.loading import load_tokenizer


def export_policy(ranks: RankGroup, folder: Path, *, tokenizer_of: str) -> None:
    """Write the ranks' policy and a tokenizer; the folder appears whole, in place of an older one.

    Args:
        tokenizer_of: the checkpoint that training started from.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    ranks.export_policy(temporary)
    load_tokenizer(tokenizer_of, "policy").save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
