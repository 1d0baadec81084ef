"""Starting the workers of one role in their placement group, replacing those that are lost, ending them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from rlhf_dist.cluster.calls import Call
from rlhf_dist.cluster.events import Events, Handler
from rlhf_dist.cluster.liveness import Heartbeats, Worker, actor_class_of
from rlhf_dist.cluster.placement import RoleShare, ask_for_room, options_in, reserve
from rlhf_dist.errors import RunError

OnWorkerFailure = Callable[[int, RunError], None]


def end_the_run(_: int, error: RunError) -> None:
    """What a failed worker means where nobody replaces it."""
    raise error


class Workers:
    """The actors of one role."""

    def __init__(
        self,
        worker_class: type[Worker],
        share: RoleShare,
        *,
        placement_timeout_s: float,
        arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
        together: bool = False,
    ) -> None:
        """Reserve room and create the actors; they start in the background.

        Args:
            arguments: positional and keyword arguments of worker `index`.
            together: none is of use without the others: they are placed together, and all are replaced where
                one is.
        """
        self._share, self._arguments, self._together = share, arguments, together
        self._groups = reserve(share, together=together, timeout_s=placement_timeout_s)
        self._actor_class = actor_class_of(worker_class)
        self._lives = [0] * share.num_workers  # how often each was replaced
        self.actors = [self._create(index) for index in range(share.num_workers)]
        self.on_failure: OnWorkerFailure = end_the_run
        """Called with the worker's index and what a call to it, or a heartbeat, ended with."""

    def __len__(self) -> int:
        return len(self.actors)

    def name(self, index: int) -> str:
        """What messages call a worker."""
        return f"{self._share.role} worker {index}"

    def call(self, index: int, method: str, *args: Any, action: str, **kwargs: Any) -> Call:
        """Call one worker."""
        return self.as_call(getattr(self.actors[index], method).remote(*args, **kwargs), index, action)

    def as_call(self, ref: ray.ObjectRef, index: int, action: str) -> Call:
        """A call to a worker that was made with options of its own."""
        return Call(ref, self.name(index), action)

    def expect(
        self,
        events: Events,
        index: int,
        method: str,
        *args: Any,
        action: str,
        then: Handler,
        timeout_s: float,
    ) -> None:
        """Call one worker and have `then` called with the result, or `on_failure` with what went wrong."""
        call = self.call(index, method, *args, action=action)
        events.expect(call, then, timeout_s, on_failure=lambda error: self.on_failure(index, error))

    def calls(self, method: str, *args: Any, action: str) -> list[Call]:
        """Call every worker with the same arguments."""
        return [self.call(index, method, *args, action=action) for index in range(len(self))]

    def start(self, *args: Any, action: str, **kwargs: Any) -> list[Call]:
        """Have every worker begin to load; wait for the calls to know that it did."""
        return [self.call(index, "start", *args, action=action, **kwargs) for index in range(len(self))]

    def watch(self, heartbeats: Heartbeats, index: int) -> None:
        """Have `on_failure` called when a worker stops answering, until it is replaced."""
        life = self._lives[index]
        heartbeats.watch(
            self.name(index),
            self.actors[index],
            is_current=lambda: self._lives[index] == life,
            on_failure=lambda error: self.on_failure(index, error),
        )

    def life(self, index: int) -> int:
        """How often a worker was replaced: tells an answer of the one before from one of this one."""
        return self._lives[index]

    def dismiss(self, events: Events, index: int) -> None:
        """Kill a worker, whatever it is doing, and wait for nothing more from it."""
        self._lives[index] += 1
        events.forget(self.name(index))
        ray.kill(self.actors[index], no_restart=True)

    def has_room(self, index: int) -> bool:
        """Whether a dismissed worker has its place. Where that went with its node, another is asked for."""
        group = placement_group_table(self._groups[index])
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if group["state"] == "CREATED" and nodes.issuperset(group["bundles_to_node_id"].values()):
            return True
        if group["state"] in ("CREATED", "RESCHEDULING"):  # others wait for a place already
            self._move(index)
        return False

    def _move(self, index: int) -> None:
        lost = self._groups[index]
        remove_placement_group(lost)
        group = ask_for_room(self._share, together=self._together)
        self._groups = [group if each == lost else each for each in self._groups]

    def replace(self, index: int) -> None:
        """Create a new actor in the place of a dismissed one."""
        self.actors[index] = self._create(index)

    def end(self) -> None:
        """Kill the actors and give their room back."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        for group in set(self._groups):
            remove_placement_group(group)

    def _create(self, index: int) -> Any:
        args, kwargs = self._arguments(index)
        place = options_in(self._groups[index], index if self._together else 0, self._share)
        return self._actor_class.options(**place).remote(*args, **kwargs)
