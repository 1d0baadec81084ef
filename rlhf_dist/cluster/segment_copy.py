"""A snapshot's way to other nodes: out of shared memory into Ray's object store, which each node pulls once.

This imports neither torch nor an engine, so that the task that runs it starts at once.
"""

from __future__ import annotations

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.errors import WeightsError
from rlhf_dist.types import PublishedWeights, SegmentAddress
from rlhf_dist.weights.segment import MappedSegment


def copy_to_object_store(published: PublishedWeights) -> ray.ObjectRef:
    """A reference to all bytes of a snapshot: a copy made on the learner's node, but not by the learner."""
    task = ray.remote(read_segment).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(published.node, soft=False),
    )
    return task.remote(published)


def read_segment(published: PublishedWeights) -> np.ndarray:
    """The bytes of a snapshot of this node; whoever gets them checks the digests.

    Raises:
        WeightsError: it has been overwritten, or is gone with its learner.
    """
    assert isinstance(published.segment, SegmentAddress)
    try:
        segment = MappedSegment(published.segment)
    except OSError as error:
        raise WeightsError(
            f"weight snapshot version {published.manifest.version} cannot be opened on the learner's node: "
            "the learner that wrote it has ended"
        ) from error
    segment.check(published)
    return segment.data
