"""What processes take: this one and those that it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlhf_dist.bench.processes import Usage, is_actor, usage_of_all


def test_a_child_and_its_child_are_found_with_what_they_took():
    grandchild = f"{sys.executable} -c 'sum(range(10**7)); input()'"
    code = f"import subprocess; print('up', flush=True); subprocess.run({grandchild!r}, shell=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()

        def counting():
            return [
                each for each in usage_of_all().values() if each.name.endswith("sum(range(10**7)); input()")
            ]

        while not any(each.cpu_s >= 0.05 for each in counting()):
            assert child.poll() is None
        found = usage_of_all()
        assert found.keys() >= {os.getpid(), child.pid}
        assert all(each.rss_bytes > 2**20 for each in counting())
        assert usage_of_all(child.pid).keys() < found.keys()
        child.communicate(b"\n")
    assert child.pid not in usage_of_all()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("ray::ExperienceQueue", True),
        ("ray::ExperienceQueue.put", True),
        ("ray::ExperienceQueues", False),
        ("python -m ray::ExperienceQueue", False),
    ],
)
def test_an_actor_is_known_by_its_title(name, is_one):
    assert is_actor(Usage(name, 0.0, 0), "ExperienceQueue") is is_one
