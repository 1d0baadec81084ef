"""What each role reserves, and that the impossible is refused at once. No cluster is started."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.cluster.placement import RoleShare, check_fits, share_out
from rlhf_dist.engines.settings import WorkerSettings
from rlhf_dist.errors import ResourceError

ON_CPU = RoleShare("rollout", num_workers=2, cpus=0.5, gpus=0, threads=3)
ON_GPU = dataclasses.replace(ON_CPU, gpus=1.0)


def roles(**counts):
    return {role: WorkerSettings(num_workers=count) for role, count in counts.items()}


# ------------------------------------------------------------------------------------------ share_out


def test_by_default_every_worker_reserves_an_equal_share_of_a_node():
    shares = share_out(roles(rollout=2, scoring=1, learner=2), node_cpus=2)
    assert shares == [
        RoleShare("rollout", 2, cpus=0.33, gpus=0, threads=1),  # 2 cores for 5 workers and one to spare
        RoleShare("scoring", 1, cpus=0.33, gpus=0, threads=2),
        RoleShare("learner", 2, cpus=0.33, gpus=0, threads=1),
    ]


def test_on_a_large_node_a_worker_reserves_one_cpu_and_the_role_threads_for_all_cores():
    shares = share_out(roles(rollout=4, learner=3), node_cpus=64)
    assert [(share.cpus, share.threads) for share in shares] == [(1.0, 16), (1.0, 21)]


def test_what_is_configured_is_what_is_reserved():
    chosen = WorkerSettings(num_workers=3, cpus_per_worker=2.5, threads_per_worker=7, gpus_per_worker=0.5)
    (share,) = share_out({"learner": chosen}, node_cpus=2)
    assert share == RoleShare("learner", 3, cpus=2.5, gpus=0.5, threads=7)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.floats(0.5, 256),
)
def test_default_shares_fit_on_one_node_and_leave_no_worker_without(counts, node_cpus):
    asked = {f"role {index}": WorkerSettings(num_workers=count) for index, count in enumerate(counts)}
    shares = share_out(asked, node_cpus=node_cpus)
    assert [share.num_workers for share in shares] == counts
    assert all(share.cpus >= 0.01 and share.threads >= 1 for share in shares)
    if node_cpus / (sum(counts) + 1) >= 0.01:
        check_fits(shares, {"CPU": node_cpus})
        for share in shares:
            assert share.threads == 1 or share.threads * share.num_workers <= node_cpus


# ----------------------------------------------------------------------------------------- check_fits


def test_what_fits_exactly_is_accepted():
    check_fits([ON_CPU, RoleShare("learner", 10, cpus=0.1, gpus=0, threads=1)], {"CPU": 2.0})


def test_too_few_cpus_are_refused_with_what_each_role_asks_for():
    learner = RoleShare("learner", 3, cpus=1.5, gpus=0, threads=1)
    with pytest.raises(ResourceError) as caught:
        check_fits([ON_CPU, learner], {"CPU": 4.0, "GPU": 8.0})
    assert str(caught.value) == (
        "the run needs 5.5 CPUs (rollout 2 x 0.5, learner 3 x 1.5), the cluster has 4; lower num_workers or "
        "cpus_per_worker of a role, or join a larger cluster (--address)"
    )


def test_gpus_are_counted_for_the_roles_that_want_some():
    with pytest.raises(ResourceError) as caught:
        check_fits([ON_GPU, RoleShare("scoring", 4, cpus=0.5, gpus=0, threads=1)], {"CPU": 99.0})
    assert str(caught.value).startswith(
        "the run needs 2 GPUs (rollout 2 x 1), the cluster has 0; lower num_workers or gpus_per_worker"
    )


def test_without_any_resource_cpus_are_what_is_missing():
    with pytest.raises(ResourceError, match=r"needs 1 CPUs .* the cluster has 0"):
        check_fits([ON_CPU], {})


# ---------------------------------------------------------------------------------------- environment


def test_threads_of_a_worker_are_set_before_torch_is_there():
    environment = ON_CPU.environment
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")
    assert environment["OMP_WAIT_POLICY"] == "passive"


def test_a_worker_on_cpu_sees_no_gpu_and_one_on_gpu_keeps_what_ray_gives_it():
    assert ON_CPU.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert ON_CPU.environment["DS_ACCELERATOR"] == "cpu"
    only_on_cpu = {"CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "VLLM_CPU_OMP_THREADS_BIND"}
    assert only_on_cpu <= set(ON_CPU.environment)
    assert not only_on_cpu & set(ON_GPU.environment)


def test_a_rollout_worker_on_cpu_keeps_the_memory_that_it_frees():
    script = (
        "import resource, numpy\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    numpy.ones(80_000_000, numpy.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(), faults(), print(faults())"
    )
    environment = os.environ | ON_CPU.environment
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert int(run.stdout) < 10, "80 MB are the same pages again"
    assert "MALLOC_MMAP_MAX_" not in ON_GPU.environment
    assert "MALLOC_MMAP_MAX_" not in dataclasses.replace(ON_CPU, role="learner").environment


def test_workers_find_modules_where_the_run_was_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert ON_CPU.environment["PYTHONPATH"] == str(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"/one{os.pathsep}/two")
    assert ON_CPU.environment["PYTHONPATH"] == os.pathsep.join([str(tmp_path), "/one", "/two"])


@pytest.mark.parametrize("share", [ON_CPU, ON_GPU], ids=["cpu", "gpu"])
def test_an_environment_is_text_only(share):
    assert {type(text) for pair in share.environment.items() for text in pair} == {str}
