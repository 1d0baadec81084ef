"""The file that `--out` names: whether it can be written is found before anything is measured."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rlhf_dist.driver.run_folder import write_json
from rlhf_dist.errors import ConfigError, StorageError


def check_out(out: Path | None) -> None:
    """Refuse a file that could not be written in the end. Nothing is left of the trial.

    Raises:
        ConfigError: it is a folder, or cannot be made where it is to lie.
    """
    if out is None:
        return
    if os.path.isdir(out):  # no error where the name is too long
        raise ConfigError(f"--out {out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {out.parent}; make it first, or name another file"
        )
    try:
        tempfile.NamedTemporaryFile(dir=out.parent, prefix=f"{out.name}.").close()
    except OSError as error:
        raise ConfigError(
            f"--out {out}: it cannot be made in the folder {out.parent} ({error.strerror}); name another file"
        ) from error


def write_results(out: Path, results: Any) -> None:
    """Write what a bench has printed as JSON.

    Raises:
        StorageError: it cannot be written, though `check_out` found that it could.
    """
    try:
        write_json(out, results)
    except StorageError as error:
        raise StorageError(f"{error}; the figures are in the table above only") from error
