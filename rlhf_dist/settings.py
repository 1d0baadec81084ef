"""The base of every configuration section: typed, frozen, and strict about names.

A section lives beside the code that reads it (`DataSettings` in `rlhf_dist/data`, `PPOSettings` in
`rlhf_dist/algorithms/ppo.py`); `rlhf_dist/config.py` composes them into one tree.
"""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

GIB = 1024**3
"""Bytes."""


class Section(BaseModel):
    """One section of the run's configuration. Unknown keys are errors; instances are immutable."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, values: Any) -> Any:
        """YAML reads `off` as false and `on` as true, which are numbers to pydantic."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            kinds = {field.annotation, *typing.get_args(field.annotation)} if field is not None else set()
            if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
                nothing = ", or null for none" if type(None) in kinds else ""
                raise ValueError(f"{name} is a number, not on or off; write one{nothing}")
        return values
