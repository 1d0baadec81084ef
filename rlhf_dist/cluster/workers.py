"""Starting the workers of one role in their placement group, and ending them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from rlhf_dist.cluster.calls import Call, wait_for_all
from rlhf_dist.cluster.placement import RoleShare, options_in, reserve


class Workers:
    """The actors of one role."""

    def __init__(
        self,
        worker_class: type,
        share: RoleShare,
        *,
        placement_timeout_s: float,
        arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        """Reserve room and create the actors; they start in the background.

        Args:
            arguments: positional and keyword arguments of worker `index`.
        """
        self._share = share
        self._group = reserve(share, timeout_s=placement_timeout_s)
        actor_class = ray.remote(worker_class)
        self.actors = []
        for index in range(share.num_workers):
            args, kwargs = arguments(index)
            options = options_in(self._group, index, share)
            self.actors.append(actor_class.options(**options).remote(*args, **kwargs))

    def __len__(self) -> int:
        return len(self.actors)

    def name(self, index: int) -> str:
        """What messages call a worker."""
        return f"{self._share.role} worker {index}"

    def call(self, index: int, method: str, *args: Any, action: str, **kwargs: Any) -> Call:
        """Call one worker."""
        return Call(getattr(self.actors[index], method).remote(*args, **kwargs), self.name(index), action)

    def call_all(self, method: str, *args: Any, action: str, timeout_s: float, **kwargs: Any) -> list[Any]:
        """Call every worker with the same arguments and wait for all of them."""
        calls = [self.call(index, method, *args, action=action, **kwargs) for index in range(len(self))]
        return wait_for_all(calls, timeout_s)

    def start(self, *args: Any, action: str, **kwargs: Any) -> list[Call]:
        """Have every worker begin to load; wait for the calls to know that they did."""
        return [self.call(index, "start", *args, action=action, **kwargs) for index in range(len(self))]

    def end(self) -> None:
        """Kill the actors and give their room back."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self._group)
