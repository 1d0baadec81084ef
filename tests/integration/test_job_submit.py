"""The quickstart through `ray job submit`, on a cluster with token authentication."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from rlhf_dist.cluster.process_group import free_port

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head node of its own: free ports, its own temporary folder and token."""
    own = tmp_path_factory.mktemp("cluster")
    token = own / "token"
    token.write_text("a" * 64)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "ray-client-server-port": free_port()}
    ports["dashboard-agent-listen-port"] = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, (own / "head.log").open("w+") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
            + [f"--{name}={number}" for name, number in ports.items()],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_until_up(address, head, log)
            yield address, environment
        finally:
            members = [process for process in psutil.process_iter() if session_of(process) == head.pid]
            head.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(members, timeout=30)
            for process in alive:
                process.kill()


def wait_until_up(address, head, log, deadline_s=60):
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if head.poll() is not None:
            log.seek(0)
            pytest.fail(f"the head node ended: {log.read()[-2000:]}")
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
        except urllib.error.HTTPError:
            return  # it is up, and wants the token
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"no dashboard at {address} within {deadline_s} s")


def session_of(process):
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def submit(address, environment, *arguments, deadline_s=60):
    """`ray job submit`, again while the new cluster's agent has not reported yet."""
    deadline = time.monotonic() + deadline_s
    while True:
        job = subprocess.run(
            [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *arguments],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if "No available agent" not in job.stderr or time.monotonic() > deadline:
            return job


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_submit_follow_result_and_resume(cluster, tmp_path):
    address, environment = cluster
    folder = tmp_path / "run"
    train = (
        *("rlhf-dist", "train", "configs/quickstart.yaml", f"run.dir={folder}", "run.num_sample_answers=1"),
        *("sft.num_steps=20", "rollout.prompts_per_step=16", "algorithm.num_epochs=1"),
        *("rollout.num_workers=1", "learner.num_workers=1"),
    )
    job = submit(address, environment, *train, "run.num_steps=2")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "supervised step 20/20" in job.stdout, "the log is followed"
    assert "step    2/2" in job.stdout
    assert "trained policy" in job.stdout
    assert steps_in(folder) == [0, 1]
    assert (folder / "policy" / "model.safetensors").exists()
    again = submit(address, environment, *train, "run.num_steps=3", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "supervised step" not in again.stdout
    assert steps_in(folder) == [0, 1, 2]


@pytest.mark.long
def test_a_job_that_is_stopped_can_be_resumed(cluster, tmp_path):
    address, environment = cluster
    folder = tmp_path / "run"
    train = (
        *("rlhf-dist", "train", "configs/quickstart.yaml", f"run.dir={folder}", "run.num_sample_answers=1"),
        *("sft.num_steps=20", "rollout.prompts_per_step=16", "algorithm.num_epochs=1"),
        *("rollout.num_workers=1", "learner.num_workers=1", "checkpoint.every_steps=2"),
    )
    on_cluster = ("--address", address)
    stop = [RAY, "job", "stop", *on_cluster, "stopped-job"]
    submitted = ("job", "submit", *on_cluster, "--submission-id", "stopped-job", "--no-wait")
    command = [RAY, *submitted, "--working-dir", ".", "--", *train, "run.num_steps=500"]
    subprocess.run(command, env=environment, cwd=REPOSITORY, timeout=120, check=True)
    deadline = time.monotonic() + 240
    while not ((folder / "metrics.jsonl").exists() and len(steps_in(folder)) >= 4):
        assert time.monotonic() < deadline, "no four steps within 240 s"
        time.sleep(0.2)
    subprocess.run(stop, env=environment, timeout=120, check=True)
    done = len(steps_in(folder))
    again = submit(address, environment, *train, f"run.num_steps={done + 2}", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps_in(folder) == list(range(done + 2))


def test_without_the_token_nothing_is_submitted(cluster, tmp_path):
    address, environment = cluster
    without = {key: value for key, value in environment.items() if not key.startswith("RAY_AUTH")}
    job = submit(address, without | {"HOME": str(tmp_path)}, "rlhf-dist", "version")
    assert job.returncode != 0
    assert "token authentication is enabled" in job.stderr
