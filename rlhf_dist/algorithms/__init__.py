"""The recipes: one file an algorithm, found by the name in the configuration. `parts` is what they share."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from rlhf_dist.algorithms.base import Algorithm, AlgorithmSettings
from rlhf_dist.errors import ConfigError


def algorithm_names() -> list[str]:
    """The names that `algorithm.name` may have: the modules of this folder, less `base`."""
    modules = pkgutil.iter_modules(__path__)
    return sorted(module.name for module in modules if module.name != "base" and not module.ispkg)


def settings_class(name: str) -> type[AlgorithmSettings]:
    """The settings section of an algorithm.

    Raises:
        ConfigError: no algorithm has this name.
    """
    settings: type[AlgorithmSettings] = _module(name).Settings
    return settings


def make_algorithm(settings: AlgorithmSettings) -> Algorithm:
    """The algorithm that these settings belong to."""
    algorithm: Algorithm = _module(settings.name).Recipe(settings)
    return algorithm


def _module(name: str) -> ModuleType:
    if name not in algorithm_names():
        raise ConfigError(f"algorithm.name={name!r} is not known; there are: {', '.join(algorithm_names())}")
    return importlib.import_module(f"{__name__}.{name}")
