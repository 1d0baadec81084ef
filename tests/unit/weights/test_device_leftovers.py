import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

DEADLINE_S = 30
SHARER = """
import os, sys, time
from pathlib import Path
from rlhf_dist.weights.device_leftovers import remove_at_the_end
folder = Path(sys.argv[1])
remove_at_the_end(folder)
for name in (f"cuda.shm.0.{os.getpid():x}.1", f"torch_{os.getpid()}_2208817107_0"):
    (folder / name).touch()
(folder / "ready").touch()
time.sleep(float(sys.argv[2]))
"""


def wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {DEADLINE_S} s"
        time.sleep(0.02)


@pytest.mark.parametrize("ending", [signal.SIGKILL, None])
def test_files_of_a_process_that_ended_are_removed_and_no_others(ending, tmp_path):
    others = {f"torch_{os.getpid()}_1_0", f"cuda.shm.0.{os.getpid():x}.1", "psm_1", "ready"}
    for name in others - {"ready"}:
        (tmp_path / name).touch()
    seconds = "600" if ending else "0"
    process = subprocess.Popen([sys.executable, "-c", SHARER, str(tmp_path), seconds])
    if ending:
        wait_until((tmp_path / "ready").exists, "the process was not ready")
        assert len(os.listdir(tmp_path)) == len(others) + 2, "they are needed while the process lives"
        process.send_signal(ending)
    assert process.wait(DEADLINE_S) == (-ending if ending else 0)
    wait_until(lambda: set(os.listdir(tmp_path)) == others, "they were not removed")
    wait_until(lambda: not watchers(process.pid), "the watching process did not end")


def watchers(watched):
    return [each for each in psutil.process_iter(["cmdline"]) if str(watched) in (each.info["cmdline"] or [])]
