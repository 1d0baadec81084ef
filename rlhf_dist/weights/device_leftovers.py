"""What CUDA and torch leave in /dev/shm of a process that shared GPU memory, removed once it has ended.

    cuda.shm.UID.PID.N    CUDA's own, PID in hexadecimal; left however the process ends
    torch_PID_RANDOM_N    torch's count of who uses the memory; left when the process is killed

Others may look into both for as long as the process lives, and a process that is killed cleans nothing up. So
a small process beside it waits for its end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
START_TIMEOUT_S = 30

_WATCHER = """
import contextlib, glob, os, select, sys
if os.fork():
    os._exit(0)  # what goes on is nobody's child, so that nobody ends it along with the one it watches
process, folder = int(sys.argv[1]), glob.escape(sys.argv[2])
with contextlib.suppress(ProcessLookupError):
    select.select([os.pidfd_open(process)], [], [])
for pattern in (f"cuda.shm.*.{process:x}.*", f"torch_{process}_*"):
    for path in glob.glob(f"{folder}/{pattern}"):
        with contextlib.suppress(OSError):
            os.unlink(path)
"""


def remove_at_the_end(folder: Path = SHARED_MEMORY) -> None:
    """Have this process's files removed when it ends, in whatever way.

    Raises:
        subprocess.SubprocessError: the process that is to do it did not start.
    """
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid()), str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
        timeout=START_TIMEOUT_S,
    )
