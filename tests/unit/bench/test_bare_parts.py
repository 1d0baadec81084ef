"""Parts in processes of their own: their environment, what they print, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

import pytest

from rlhf_dist.bench.bare_parts import in_own_process
from rlhf_dist.errors import DataError, DeadlineError, WorkerError

DEADLINE_S = 120


def seen_seconds():
    print("a word on stdout")
    return os.getpid(), os.environ["OMP_NUM_THREADS"], "torch" in sys.modules


def failing_seconds(message):
    raise DataError(message)


def dying_seconds():
    print("out of memory", flush=True)
    os._exit(3)


def endless_seconds():
    time.sleep(DEADLINE_S)


@pytest.fixture
def do(tmp_path):
    def do(part, *arguments, timeout_s=DEADLINE_S):
        return in_own_process(
            part,
            *arguments,
            environment={"OMP_NUM_THREADS": "7"},
            log=tmp_path / "parts.log",
            timeout_s=timeout_s,
        )

    return do


def test_a_part_has_its_environment_before_torch_is_there(do, tmp_path):
    pid, threads, has_torch = do(seen_seconds)
    assert (pid != os.getpid(), threads, has_torch) == (True, "7", False)
    assert (tmp_path / "parts.log").read_text() == "a word on stdout\n"


def test_its_error_for_people_arrives_as_it_was_raised(do):
    with pytest.raises(DataError, match="no such prompts"):
        do(failing_seconds, "no such prompts")


def test_its_death_is_told_with_its_last_words(do):
    with pytest.raises(WorkerError, match="the bare part 'dying' died; its last words: out of memory"):
        do(dying_seconds)


def test_past_its_deadline_it_is_killed(do):
    with pytest.raises(DeadlineError, match=r"the bare part 'endless' did not end within 3 s"):
        do(endless_seconds, timeout_s=3)
    assert not multiprocessing.active_children()
