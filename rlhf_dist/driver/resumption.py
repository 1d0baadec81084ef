"""What a run that is resumed must have in common with the one that was begun in its folder.

Ordinals stand for prompts in the journal, and counts of them decide what is handed out next. What gives them
their meaning is fixed when a run begins; every other setting may change, and the user is told which did.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_dist.algorithms import make_algorithm
from rlhf_dist.config import ABSENT, Config, Difference, differences, load_config, read_tree
from rlhf_dist.data.prompts import Fingerprint, PromptSet
from rlhf_dist.driver.run_folder import RunFolder, write_json
from rlhf_dist.errors import ConfigError, DataError, RunError
from rlhf_dist.experience.steps import read_history

FIXED = (
    "run.seed",
    "policy.model",
    "data",
    "sft",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "algorithm.name",
)
"""Keys and sections that decide which prompt an ordinal means, how many a step has, and what the journal's
samples are samples of. With another one the journal's entries would mean something else."""
MAX_CHARACTERS = 60
"""Of a value, in the lines that say what has changed."""


def check_settings(folder: RunFolder, config: Config) -> list[Difference]:
    """The settings that are others than when the run last went on, all of which may be.

    Raises:
        ConfigError: some may not be; each is named with its remedy.
    """
    if not folder.config.exists():
        return []
    before, after = read_tree(folder.config), config.model_dump(mode="json")
    found = [each for each in differences(before, after) if ABSENT not in each and each.key != "run.dir"]
    fixed = [each for each in found if _is_fixed(each.key)]
    if fixed:
        lines = [f"  {_text(each)}; set {each.key}={shlex.quote(_value(each.one))}" for each in fixed]
        raise ConfigError(
            "\n".join(
                [
                    f"run folder {folder.root} cannot be resumed with other prompts or another start:",
                    *lines,
                    "  or set run.dir to a new folder, for a new run",
                ]
            )
        )
    if any(each.key.startswith("algorithm.") for each in found):
        check_reference(config, load_config(folder.config))
    return found


def check_reference(config: Config, recorded: Config) -> None:
    """Samples have log-probabilities of the reference only where the run took them.

    Raises:
        ConfigError: they are needed now, and were not then.
    """
    if make_algorithm(config.algorithm).needs.reference > make_algorithm(recorded.algorithm).needs.reference:
        raise ConfigError(
            f"algorithm.name={config.algorithm.name} with algorithm.kl.coef={config.algorithm.kl.coef:g} "
            "needs the reference's log-probabilities, which the run did without and so did not write down; "
            "set algorithm.kl.coef=0"
        )


def check_prompts(folder: RunFolder, config: Config, prompts: PromptSet) -> None:
    """Compare the prompts with those that the run began with, which folders of older versions do not know.

    Raises:
        DataError: they are others, so that the order of all of them is.
    """
    if not folder.prompts.exists():
        return
    began, now = read_fingerprint(folder), prompts.fingerprint()
    if began == now:
        return
    numbers = f"{began.num_prompts} then, {now.num_prompts} now"
    raise DataError(
        f"data.prompts={config.data.prompts}: these are not the prompts that the run in {folder.root} began "
        f"with ({numbers if began.num_prompts != now.num_prompts else f'{numbers}, with other tokens'}), and "
        "the journal counts by those; bring back the data, the tokenizer and the limits on a prompt's length "
        "as they were, or set run.dir to a new folder"
    )


def read_fingerprint(folder: RunFolder) -> Fingerprint:
    """What `write_fingerprint` wrote."""
    return Fingerprint(**json.loads(folder.prompts.read_text(encoding="utf-8")))


def write_fingerprint(folder: RunFolder, prompts: PromptSet) -> None:
    """Keep what `check_prompts` compares with."""
    write_json(folder.prompts, prompts.fingerprint()._asdict())


def change_notes(changes: list[Difference]) -> list[str]:
    """What the user should know of settings that have changed, a line each."""
    return [_text(each, MAX_CHARACTERS) for each in changes]


class RecordedPolicies:
    """What the steps that a resumed run repeats gave when they were done before."""

    def __init__(
        self, digests: Mapping[int, str], say: Callable[[str], None], *, must_agree: bool = False
    ) -> None:
        """Args: must_agree: whether another policy than before ends the run."""
        self._digests, self._say, self._must_agree = digests, say, must_agree

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, step: int, digest: str) -> None:
        """Compare the policy after a step with the one before, if there was one.

        Raises:
            RunError: it is another one, and the run has promised the same.
        """
        if self._digests.get(step, digest) == digest:
            return
        text = f"step {step}, done once more, gave another policy than before"
        if self._must_agree:
            raise RunError(
                f"{text}, where run.deterministic=true promises the same: the machine, the number of threads "
                "(learner.threads_per_worker), the software or a setting is another; go on as it was, or "
                "resume with run.deterministic=false to go on with the new policy"
            )
        self._say(text)


def recorded_policies(
    folder: RunFolder,
    config: Config,
    first_step: int,
    changes: list[Difference],
    say: Callable[[str], None],
) -> RecordedPolicies:
    """Of the steps in the journal from a step on.

    They have to come out alike where that is promised: with `run.deterministic`, on CPU, with the same
    settings.
    """
    steps = read_history(folder.journal).steps.values()
    digests = {
        each.step: each.policy_digest
        for each in steps
        if each.step >= first_step and each.policy_digest is not None
    }
    is_promised = config.run.deterministic and config.learner.gpus_per_worker == 0
    return RecordedPolicies(digests, say, must_agree=is_promised and not changes)


def _is_fixed(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in FIXED)


def _text(change: Difference, max_characters: int | None = None) -> str:
    one, other = (_shortened(_value(value), max_characters) for value in (change.one, change.other))
    return f"{change.key}: {one} -> {other}"


def _value(value: Any) -> str:
    """As it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shortened(text: str, max_characters: int | None) -> str:
    if max_characters is None or len(text) <= max_characters:
        return text
    return f"{text[: max_characters - 1]}…"
