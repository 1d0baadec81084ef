"""What each role reserves, whether the cluster has it, and the placement groups that hold it.

One bundle a worker, so that counts scale independently. Workers that can do without each other have a
placement group each: what is lost with a node is given back, and asked for anew. A group that Ray itself
places again after it has lost a part keeps Ray's control service busy for as long as there is no room, which
slows everything on its node.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.engines.settings import WorkerSettings
from rlhf_dist.errors import ResourceError


@dataclass(frozen=True)
class RoleShare:
    """What every worker of a role gets."""

    role: str
    num_workers: int
    cpus: float
    gpus: float
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the role's processes, complete before torch is imported in them.

        Waiting OpenMP threads must sleep: with the default they spin, and one busy neighbour then slows
        a worker tenfold. A rollout worker on CPU keeps the memory that it frees: loading weights frees
        every matrix and takes as much again, and getting fresh pages took longer than all the rest of it.
        FlashInfer's sampler knows no seed for each request, which samples have to follow from.
        """
        variables = {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")])),
        }
        if self.gpus == 0:
            variables |= {
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "TORCHDYNAMO_DISABLE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
        else:
            variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if self.gpus == 0 and self.role == "rollout":
            variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
        return variables


def share_out(roles: dict[str, WorkerSettings], *, node_cpus: float) -> list[RoleShare]:
    """CPUs, GPUs and threads of each role's workers.

    Roles take turns in synchronous training, so by default the threads of one role fill a node's cores
    and the reservations of all roles together do: nothing oversubscribes the cores, and everything fits.

    Args:
        node_cpus: cores of one node.
    """
    total_workers = sum(settings.num_workers for settings in roles.values())
    equal_share = max(0.01, math.floor(100 * min(1.0, node_cpus / (total_workers + 1))) / 100)
    return [
        RoleShare(
            role=role,
            num_workers=settings.num_workers,
            cpus=settings.cpus_per_worker or equal_share,
            gpus=settings.gpus_per_worker,
            threads=settings.threads_per_worker or max(1, int(node_cpus // settings.num_workers)),
        )
        for role, settings in roles.items()
    ]


def check_fits(shares: list[RoleShare], resources: dict[str, float]) -> None:
    """Refuse at once what the whole cluster could never hold.

    Raises:
        ResourceError: naming the resource, what each role asks for and what there is.
    """
    for resource, amount_of in (("CPU", lambda share: share.cpus), ("GPU", lambda share: share.gpus)):
        asked = sum(share.num_workers * amount_of(share) for share in shares)
        there = resources.get(resource, 0.0)
        if asked > there + 1e-6:
            roles = ", ".join(
                f"{share.role} {share.num_workers} x {amount_of(share):g}"
                for share in shares
                if amount_of(share) > 0
            )
            raise ResourceError(
                f"the run needs {asked:g} {resource}s ({roles}), the cluster has {there:g}; "
                f"lower num_workers or {resource.lower()}s_per_worker of a role, or join a larger cluster "
                "(--address)"
            )


def reserve(share: RoleShare, *, together: bool, timeout_s: float) -> list[PlacementGroup]:
    """The placement group of each worker of a role.

    Args:
        together: one group for all, which is placed and lost as a whole; else one for each.

    Raises:
        ResourceError: the cluster did not free the resources in time.
    """
    deadline = time.monotonic() + timeout_s
    num_groups = 1 if together else share.num_workers
    groups = [ask_for_room(share, together=together) for _ in range(num_groups)]
    for group in groups:
        if not group.wait(timeout_seconds=max(0.0, deadline - time.monotonic())):
            raise _no_room(share, groups, timeout_s)
    return groups * share.num_workers if together else groups


def ask_for_room(share: RoleShare, *, together: bool) -> PlacementGroup:
    """A new placement group, of all workers of a role or of one, which may have to wait for its place."""
    bundles = [_bundle(share)] * (share.num_workers if together else 1)
    return placement_group(bundles, strategy="PACK")


def _bundle(share: RoleShare) -> dict[str, float]:
    return {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})


def _no_room(share: RoleShare, groups: list[PlacementGroup], timeout_s: float) -> ResourceError:
    for group in groups:
        remove_placement_group(group)
    bundle = _bundle(share)
    free = {name: ray.available_resources().get(name, 0.0) for name in bundle}
    return ResourceError(
        f"{share.num_workers} {share.role} workers of {bundle} each found no room in {timeout_s:g} s; "
        f"free in the cluster: {free}; other jobs hold the rest, or no single node has room for a worker"
    )


def options_in(group: PlacementGroup, index: int, share: RoleShare) -> dict[str, object]:
    """Actor options that put a worker into bundle `index` of its group, with the role's environment."""
    return {
        "num_cpus": share.cpus,
        "num_gpus": share.gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index
        ),
        "runtime_env": {"env_vars": share.environment},
        "max_restarts": 0,
        "max_task_retries": 0,
    }
