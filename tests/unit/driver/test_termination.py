"""SIGTERM: nothing is left in the middle, and nothing takes longer than the grace period."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from rlhf_dist.driver.termination import Termination
from rlhf_dist.errors import TerminatedError


@pytest.fixture
def termination():
    """With the signal's handler put back at the end, and the watchdog called off that would end pytest."""
    before = signal.getsignal(signal.SIGTERM)
    yield Termination(grace_period_s=600)
    signal.signal(signal.SIGTERM, before)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


def test_the_step_under_way_is_finished_first(termination, capsys):
    with termination.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        termination.check_if_interruptible()
        with pytest.raises(TerminatedError):
            termination.check()
    assert "a last checkpoint within 600 s" in capsys.readouterr().err


def test_a_wait_for_experience_ends_at_once(termination):
    with termination.handled(), termination.interruptible():
        termination.check_if_interruptible()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TerminatedError):
            termination.check_if_interruptible()


def test_a_second_signal_changes_nothing(termination, capsys):
    with termination.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err.count("terminated:") == 1


def test_without_a_signal_the_handler_before_comes_back(termination):
    before = signal.getsignal(signal.SIGTERM)
    with termination.handled():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


SLEEPER = """
import os, signal, time
from rlhf_dist.driver.termination import Termination
with Termination(grace_period_s=0.2).handled():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_past_the_grace_period_the_process_ends_whatever_it_does():
    ended = subprocess.run(
        [sys.executable, "-c", SLEEPER], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 143
    assert "the grace period of 0.2 s is over" in ended.stderr


def fill(pipe):
    """Write into a pipe until it takes no more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"." * 512)
    os.set_blocking(pipe, True)


@pytest.mark.parametrize("nobody_reads", ["closed", "full"])
def test_a_terminal_that_nobody_reads_holds_nothing_up(nobody_reads):
    read, write = os.pipe()
    if nobody_reads == "closed":
        os.close(read)
    else:
        fill(write)
    ended = subprocess.run([sys.executable, "-c", SLEEPER], stderr=write, timeout=50, check=False)
    os.close(write)
    if nobody_reads == "full":
        os.close(read)
    assert ended.returncode == 143
