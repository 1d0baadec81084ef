"""Two hosts on one machine: network namespaces with an address each, joined by a cable that can be cut.

Each is a Ray node with its own processes, ports and temporary folder. Files are shared, as on a cluster with
a common file system.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
START_DEADLINE_S = 60
END_DEADLINE_S = 20
POLL_S = 0.2
HEALTH_CHECK_S = 1
"""How often Ray looks after a node, and how long it waits for the answer."""
CABLE = "cable"
STARTED = "Ray runtime started."
"""What `ray start` prints."""


def what_is_missing() -> str | None:
    """Why no host can be made here; None: it can."""
    if shutil.which("ip") is None:
        return "there is no command `ip` (on Debian: apt install iproute2)"
    name = f"rlhf-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


class Host:
    """A network namespace, and the Ray node in it once that was started."""

    def __init__(self, name: str, address: str, folder: Path, environment: dict[str, str]) -> None:
        self._name, self.address = name, address
        self._folder, self._environment = folder, environment

    @property
    def inside(self) -> tuple[str, ...]:
        """Beginning of a command that is to run on the host."""
        return ("ip", "netns", "exec", self._name)

    @property
    def log(self) -> Path:
        """What its Ray node printed."""
        return self._folder / f"{self._name}.log"

    def start_ray(self, *arguments: str, num_cpus: int) -> None:
        """Start a Ray node, which runs until it is killed; it is up when this returns."""
        num_starts = self._num_starts()
        temporary = tempfile.mkdtemp(prefix="node-", dir=self._folder)
        options = (f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}", f"--temp-dir={temporary}")
        with self.log.open("a") as log:
            subprocess.Popen(
                [*self.inside, RAY, "start", "--block", "--disable-usage-stats", *options, *arguments],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_DEADLINE_S
        while self._num_starts() == num_starts:
            assert time.monotonic() < deadline, f"no Ray node:\n{self.log.read_text()[-3000:]}"
            time.sleep(POLL_S)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the host."""
        found = []
        for pid in _ip("netns", "pids", self._name).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """A power failure: everything that runs on the host is gone at once."""
        deadline = time.monotonic() + END_DEADLINE_S
        while alive := self.processes():
            for process in alive:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            assert time.monotonic() < deadline, f"{alive} survived SIGKILL"
            time.sleep(POLL_S)

    def pull_the_cable(self) -> None:
        """Cut the host off."""
        _ip("-n", self._name, "link", "set", CABLE, "down")

    def plug_the_cable_in(self) -> None:
        """Mend what `pull_the_cable` did."""
        _ip("-n", self._name, "link", "set", CABLE, "up")

    def _num_starts(self) -> int:
        return self.log.read_text().count(STARTED) if self.log.exists() else 0


class TwoHosts:
    """A Ray cluster of a head and another host."""

    def __init__(self, head: Host, other: Host, environment: dict[str, str]) -> None:
        self.head, self.other = head, other
        self.environment = environment
        """Of whatever is to join the cluster."""

    @property
    def address(self) -> str:
        """Of the cluster, as `--address` takes it."""
        return f"{self.head.address}:{PORT}"

    def start(self, *, head_cpus: int, other_cpus: int) -> None:
        """Start both nodes."""
        self.head.start_ray("--head", f"--port={PORT}", "--include-dashboard=false", num_cpus=head_cpus)
        self.start_other(num_cpus=other_cpus)

    def start_other(self, *, num_cpus: int) -> None:
        """Have the other host join, for the first time or once more."""
        self.other.start_ray(f"--address={self.address}", num_cpus=num_cpus)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for something to become true of the hosts."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            logs = "\n".join(host.log.read_text()[-3000:] for host in (self.head, self.other))
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{logs}"
            time.sleep(POLL_S)


@contextmanager
def two_hosts(*, node_lost_after_s: int) -> Iterator[TwoHosts]:
    """Hosts without Ray nodes; whatever runs on them ends with the block.

    Args:
        node_lost_after_s: so long may a node be silent before Ray gives it up.
    """
    made: list[Host] = []
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        environment = _environment(Path(folder), node_lost_after_s)
        try:
            for number, name in enumerate(("head", "other"), start=1):
                namespace = f"rlhf-{os.getpid()}-{name}"
                _ip("netns", "add", namespace)
                made.append(Host(namespace, f"10.77.0.{number}", Path(folder), environment))
            _join(*made)
            yield TwoHosts(*made, environment)
        finally:
            for host in made:
                host.kill()
                _ip("netns", "delete", host.inside[-1])


def _environment(folder: Path, node_lost_after_s: int) -> dict[str, str]:
    token = folder / "token"
    token.write_text("a" * 64)
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    milliseconds = str(1000 * HEALTH_CHECK_S)
    return inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_health_check_initial_delay_ms": milliseconds,
        "RAY_health_check_period_ms": milliseconds,
        "RAY_health_check_timeout_ms": milliseconds,
        "RAY_health_check_failure_threshold": str(node_lost_after_s // HEALTH_CHECK_S),
    }


def _join(head: Host, other: Host) -> None:
    first, second = head.inside[-1], other.inside[-1]
    _ip("-n", first, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second)
    for host in (head, other):
        name = host.inside[-1]
        _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", CABLE)
        _ip("-n", name, "link", "set", CABLE, "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout
