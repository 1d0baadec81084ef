"""Errors that are written for the person at the keyboard.

Everything a user can cause or mend is a `RunError`: its text names the thing, the place and the
remedy, and the command line prints it alone, without a stack trace, and exits with `exit_code`.
Any other exception is a fault of the program.
"""

from __future__ import annotations


class RunError(Exception):
    """A failure with one clear message: what, where, and what to do about it."""

    exit_code = 1


class ConfigError(RunError):
    """The configuration cannot be used: unknown key, wrong type, value out of range."""

    exit_code = 2


class DataError(RunError):
    """A data set or a prompt cannot be used: missing, empty, broken line, over the context limit."""

    exit_code = 3


class ModelError(RunError):
    """A model or tokenizer cannot be loaded, or does not fit the role it was named for."""

    exit_code = 4


class RewardError(RunError):
    """A reward raised, returned a wrong count, or returned something that is not a finite number."""

    exit_code = 5


class RewardTimeoutError(RewardError):
    """A reward function did not return in time. Its thread cannot be ended: replace the worker."""


class ResourceError(RunError):
    """The cluster cannot hold what was asked for."""

    exit_code = 6


class WeightsError(RunError):
    """A worker could not load the weights that the learner published, or not prove that it serves them."""

    exit_code = 7


class NotProvedError(WeightsError):
    """A worker's log-probabilities of the probe are not the learner's."""


class DeadlineError(RunError):
    """Something did not answer in time; the text says which role, which call, and for how long."""

    exit_code = 8


class WorkerError(RunError):
    """A worker died or failed in a call that was not the user's doing."""

    exit_code = 9


class WorkerLostError(WorkerError):
    """A worker's process or node is gone."""


class DataLostError(WorkerError):
    """What a call was to read is gone with the node that held it; the worker itself is well."""


class LearnerLostError(WorkerError):
    """A rank of the learner was lost or failed, and with it the whole group."""


class TerminatedError(RunError):
    """The run was told to end (SIGTERM), and did so in order."""

    exit_code = 143


class StorageError(RunError):
    """A folder cannot be written: the disk is full, or it may not be written."""

    exit_code = 10
