"""Snapshots from the learner's GPU to an engine's GPUs on other places, over vLLM's NCCL communicator.

One link for each engine, so that an engine that is lost takes nobody along: the learner's rank 0 is rank 0 of
it, the engine's GPUs are the others. A broadcast that the other side has left would never end by itself;
whoever waits for one looks at the clock and at the link's store, and aborts it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import DistError
from vllm.distributed.weight_transfer import nccl_common

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import Link, PublishedWeights, WeightManifest
from rlhf_dist.weights.device_memory import pieces, verify_on_device
from rlhf_dist.weights.snapshot import distinct, tensor_views

PIECE_BYTES = 256 * 1024 * 1024
"""Sent at once; the engine needs so much memory beside its weights, or as much as its largest tensor has."""
POLL_S, LOOK_S = 0.0005, 0.5
FAILED = "failed"


class NcclLink:
    """One end of a link. Made by both sides at the same time: each waits for the other."""

    def __init__(self, link: Link, communicator: Any) -> None:
        if not communicator.available:
            raise WeightsError(
                "NCCL could not be loaded, and weights.transport needs it for engines on other GPUs than the "
                "learner's; install it, or use weights.transport=shared_memory"
            )
        self._link, self._communicator = link, communicator
        self._store = communicator.group.store
        self._stream = torch.cuda.Stream()
        self._closed = threading.Event()

    @classmethod
    def of_learner(cls, link: Link) -> NcclLink:
        """The learner's end."""
        meeting = {"master_address": link.host, "master_port": link.port, "world_size": link.num_ranks}
        return cls(link, nccl_common.trainer_init(meeting))

    @classmethod
    def of_engine(cls, link: Link, parallel_config: Any) -> NcclLink:
        """The end of one of an engine's GPUs."""
        meeting = nccl_common.NCCLWeightTransferInitInfo(
            master_address=link.host, master_port=link.port, rank_offset=1, world_size=link.num_ranks
        )
        return cls(link, nccl_common.worker_init_process_group(meeting, parallel_config))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The learner's bytes on every rank; they are there when this returns.

        Raises:
            WeightsError: the other side gave up, or the deadline is past. The link is of no more use.
        """
        if self.is_closed:
            raise WeightsError("weights cannot be sent from GPU to GPU: the link was closed")
        self._stream.wait_stream(torch.cuda.current_stream())
        self._communicator.broadcast(tensor, src=0, stream=self._stream)
        done = torch.cuda.Event()
        done.record(self._stream)
        deadline, next_look = time.monotonic() + self._link.timeout_s, 0.0
        while not done.query():
            now = time.monotonic()
            reason = f"it took more than {self._link.timeout_s:g} s" if now > deadline else None
            if now > next_look:
                reason, next_look = reason or self._why_broken(), now + LOOK_S
            if reason is not None:
                self.close()
                raise WeightsError(f"weights that were sent from GPU to GPU did not arrive: {reason}")
            time.sleep(POLL_S)

    @property
    def is_closed(self) -> bool:
        """Whether it is of no more use."""
        return self._closed.is_set()

    def close(self) -> None:
        """Abort what is under way, and have the other side told."""
        if self.is_closed:
            return
        self._closed.set()
        with suppress(DistError):  # the learner, whose store it is, has ended
            self._store.set(FAILED, "1")
        self._communicator.destroy()

    def _why_broken(self) -> str | None:
        if self.is_closed:
            return "the link was closed"
        try:
            return "the other side gave up" if self._store.check([FAILED]) else None
        except DistError:
            return "the learner has ended"


class NcclReceiver:
    """A `Receiver` of an engine's process, for one link.

    The model is touched while pieces are still to come: where one is damaged the engine must not be used.
    """

    def __init__(self, link: Link, parallel_config: Any, device: torch.device) -> None:
        self.link, self._device = link, device
        self._end = NcclLink.of_engine(link, parallel_config)

    @contextmanager
    def receive(self, published: PublishedWeights) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """See `Receiver`."""
        yield self._tensors(published.manifest)

    def close(self) -> None:
        """Leave the link."""
        self._end.close()

    def _tensors(self, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
        for begin, end, entries in pieces(manifest, PIECE_BYTES):
            data = torch.empty(end - begin, dtype=torch.uint8, device=self._device)
            self._end.broadcast(data)
            verify_on_device(manifest, distinct(entries), data, begin=begin)
            yield from tensor_views(entries, data, begin=begin)


@dataclass
class _Open:
    """A link that the learner has with an engine."""

    life: str
    link: Link
    end: NcclLink | None = None

    @property
    def is_broken(self) -> bool:
        return self.end is not None and self.end.is_closed


class Senders:
    """The learner's ends, one for each engine. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._lock = threading.Lock()

    def open(self, engine: str, life: str, link: Link) -> Link:
        """The link with an engine: the one that it has, or this new one.

        Args:
            engine: its name.
            life: of its process. Another one than before ends the link with that.
        """
        with self._lock:
            before = self._open.get(engine)
            if before is not None and before.life == life and not before.is_broken:
                return before.link
            self._open[engine] = _Open(life, link)
        if before is not None and before.end is not None:
            before.end.close()
        return link

    def send(self, engine: str, manifest: WeightManifest, data: torch.Tensor) -> None:
        """Send a snapshot's bytes to an engine that receives them now.

        Raises:
            WeightsError: it gave up, or did not receive them in time.
        """
        opened = self._open[engine]
        torch.cuda.set_device(data.device)
        if opened.end is None:
            opened.end = NcclLink.of_learner(opened.link)
        for begin, end, _ in pieces(manifest, PIECE_BYTES):
            opened.end.broadcast(data[begin:end])
