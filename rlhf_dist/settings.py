"""The base of every configuration section: typed, frozen, and strict about names.

A section lives beside the code that reads it (`DataSettings` in `rlhf_dist/data`, `PPOSettings` in
`rlhf_dist/algorithms/ppo.py`); `rlhf_dist/config.py` composes them into one tree.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the run's configuration. Unknown keys are errors; instances are immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
