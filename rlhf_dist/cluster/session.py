"""Joining a Ray cluster, or starting one for this process alone."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlhf_dist.errors import ResourceError


@contextmanager
def ray_session(address: str | None, *, show_worker_output: bool) -> Iterator[None]:
    """Connect to `address`, else to `RAY_ADDRESS`, else to a local instance that ends with the block.

    Raises:
        ResourceError: no cluster answers at the address.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    local_only = {"include_dashboard": False} if target == "local" else {}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=target, logging_level=logging.ERROR, log_to_driver=show_worker_output, **local_only)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster could be joined at {target!r}: {str(error).strip().splitlines()[0]}; start one "
            "with `ray start --head`, or leave out --address and RAY_ADDRESS for a local instance"
        ) from error
    signal.signal(signal.SIGTERM, on_terminate)  # ray.init put its own in place
    try:
        yield
    finally:
        ray.shutdown()


def cpus_of_smallest_node() -> float:
    """Cores of the node with the fewest, for sharing threads out."""
    return min(
        node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]
    )
