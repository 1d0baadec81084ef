"""Joining a Ray cluster, or starting one for this process alone."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlhf_dist.errors import ResourceError

CONNECT_TIMEOUT_S = 10
REMEDY = "start one with `ray start --head`, or leave out --address and RAY_ADDRESS for a local instance"


@contextmanager
def ray_session(address: str | None, *, verbose: bool) -> Iterator[None]:
    """Connect to `address`, else to `RAY_ADDRESS`, else to a local instance that ends with the block.

    Raises:
        ResourceError: no cluster answers at the address.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(target)
    local_only = {"include_dashboard": False} if target == "local" else {}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        # Most of Ray's own words about a worker's end, which would stand beside the run's one message.
        level = logging.WARNING if verbose else logging.CRITICAL
        ray.init(address=target, logging_level=level, log_to_driver=verbose, **local_only)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster could be joined at {target!r}: {str(error).strip().splitlines()[0]}; {REMEDY}"
        ) from error
    signal.signal(signal.SIGTERM, on_terminate)  # ray.init put its own in place
    try:
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_terminate)  # which put the system's default in place


def _check_address(target: str) -> None:
    """Refuse what Ray would try for minutes, or end the process over."""
    if target in ("local", "auto"):
        return
    if "://" in target:
        raise ResourceError(
            f"the address {target!r} is not of the form HOST:PORT; "
            "from outside the cluster use `ray job submit`"
        )
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ResourceError(f"no Ray cluster answers at {target!r} ({error}); {REMEDY}") from error


def cpus_of_smallest_node() -> float:
    """Cores of the node with the fewest, for sharing threads out."""
    return min(
        node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]
    )
