"""What a run's configuration says about its experience: the queue, the ledger's rules, the journal."""

from __future__ import annotations

from pydantic import Field

from rlhf_dist.settings import GIB, Section


class JournalSettings(Section):
    """Scored experience on disk, in the run folder."""

    segment_mib: float = Field(default=64.0, gt=0)
    """A file that has grown to this is ended and another one begun. Ended files whose samples no checkpoint
    can need again are merged and compressed."""
    max_gib: float | None = Field(default=None, gt=0)
    """While the journal takes more, its oldest merged file is deleted; what a checkpoint can need stays.
    None: every sample of the run is kept."""

    @property
    def segment_bytes(self) -> int:
        """Of an ended file, at least."""
        return int(self.segment_mib * 1024**2)

    @property
    def max_bytes(self) -> int | None:
        """Of the journal; None: no limit."""
        return None if self.max_gib is None else int(self.max_gib * GIB)


class ExperienceSettings(Section):
    """The queue between scoring and the learner, and the journal behind it."""

    max_samples: int = Field(default=65_536, ge=1)
    """Samples the queue may hold, leased ones included; producers wait beyond it."""
    max_gib: float = Field(default=8.0, gt=0)
    """The same bound in GiB of experience."""
    max_staleness: int = Field(default=0, ge=0, le=64)
    """Learner steps that rollouts may run ahead. No step is trained on a sample with a token from a policy
    that is more steps behind. 0: rollouts and learner take turns."""
    lease_timeout_s: float = Field(default=7200, gt=0)
    """From a step's samples to word that it was trained. A step that takes longer gives them back, gets the
    same ones again, and counts."""
    max_attempts: int = Field(default=20, ge=1)
    """Attempts at a prompt, lost with their worker or failed, after which it is given up and written to the
    dead letters. Samples that got too old do not count. With more than `recovery.max_restarts`, a worker that
    is lost again and again ends the run before its prompts are given up."""
    max_failed_share: float = Field(default=0.1, ge=0, le=1)
    """Prompts that may be given up, as a share of all that were handed out so far; with more the run stops.
    One may always be, except with 0: then the first one stops the run."""
    journal: JournalSettings = JournalSettings()
    """Scored experience on disk, in the run folder."""
