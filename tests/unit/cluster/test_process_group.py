"""Where the ranks of a group meet."""

from __future__ import annotations

import socket

import pytest

from rlhf_dist.cluster import process_group
from rlhf_dist.cluster.process_group import free_port


@pytest.fixture
def ports(tmp_path, monkeypatch):
    """The kernel's ports begin at a number of the test's own."""

    def begin_at(number, *, candidates):
        path = tmp_path / "range"
        path.write_text(f"{number}\t60999\n")
        monkeypatch.setattr(process_group, "LOCAL_PORTS", path)
        monkeypatch.setattr(process_group, "NUM_PORTS", candidates)

    return begin_at


def test_a_port_is_below_those_that_the_kernel_hands_out(ports):
    ports(30_000, candidates=10_000)
    assert all(20_000 <= free_port() < 30_000 for _ in range(100))


def test_a_port_that_somebody_listens_on_is_passed_over(ports):
    taken = free_port()
    with socket.socket() as listening:
        listening.bind(("", taken))
        listening.listen()
        ports(taken + 1, candidates=2)
        assert {free_port() for _ in range(20)} == {taken - 1}
        ports(taken + 1, candidates=1)
        with pytest.raises(OSError, match="no free port below"):
            free_port()
