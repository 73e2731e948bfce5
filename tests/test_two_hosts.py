"""Two network namespaces as two hosts: they meet over real addresses, and a lost link ends the job in one line each.

It takes about three minutes, most of them waiting for a host that does not answer. As root, on Linux:

MTPTRAIN_TWO_HOSTS=1 python -m pytest tests/test_two_hosts.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtptrain.training.checkpoint import checkpoint_folders, open_checkpoint
from tests.command import ROOT, fitting
from tests.test_launchers import impatient_launcher

HOSTS = ("mtptrain_a", "mtptrain_b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
STEPS = 40
pytestmark = pytest.mark.skipif("MTPTRAIN_TWO_HOSTS" not in os.environ, reason="slow: MTPTRAIN_TWO_HOSTS=1 runs it")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two namespaces with a link between their interfaces `eth0`."""
    remove()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "eth0", "netns", HOSTS[0], "type", "veth", "peer", "name", "eth0", "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "eth0", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove()
        pytest.skip(f"this machine allows no network namespaces: {getattr(error, 'stderr', error)}")
    yield
    remove()


def start(light: list[str], folder: Path, port: int, launcher: Path) -> list["subprocess.Popen[str]"]:
    """Start one process of a run on each host."""
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{ADDRESSES[0]}:{port}"]
    settings = ["+recipe=distill", *light, f"train.steps={STEPS}", "train.checkpoint_every=5", "evaluate_at_end=false"]
    settings += ["mtp.experts=expert_parallel", "distributed_timeout=1", f"output_dir={folder}"]
    processes = []
    for host, address in zip(HOSTS, ADDRESSES, strict=True):
        # Where a host's name does not lead to its address, torchrun has to be told who keeps the rendezvous.
        local = ["--local-addr", address, f"--rdzv-conf=is_host={int(host == HOSTS[0])}", *meeting]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, launcher, *local, *fitting(settings)],
                env={
                    **os.environ,
                    "PYTHON": sys.executable,
                    "PYTHONPATH": str(ROOT),
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return processes


def finish(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str]]:
    """Return exit code and stderr of each host."""
    ended = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=400)
            ended.append((process.returncode, errors))
    finally:
        for process in [process for process in processes if process.poll() is None]:
            os.killpg(process.pid, signal.SIGKILL)
    return ended


def head(folder: Path) -> dict[str, torch.Tensor]:
    return open_checkpoint(folder / "checkpoints" / f"step_{STEPS:08d}").tensors()


def test_a_lost_link_ends_the_job_in_one_line_and_the_run_continues(
    hosts: None, light: list[str], tmp_path: Path
) -> None:
    launcher = impatient_launcher(tmp_path, 30)
    whole = finish(start(light, tmp_path / "whole", 29611, launcher))
    assert [code for code, _ in whole] == [0, 0], whole
    run = start(light, tmp_path / "run", 29612, launcher)
    while not checkpoint_folders(tmp_path / "run" / "checkpoints"):
        assert run[0].poll() is None, run[0].communicate()[1][-3000:]
        time.sleep(0.05)
    ip("-n", HOSTS[1], "link", "set", "eth0", "down")
    lost = finish(run)
    ip("-n", HOSTS[1], "link", "set", "eth0", "up")
    for code, errors in lost:
        assert code != 0
        assert "launch_torchrun: a node failed and the job is over" in errors
        (line,) = [line for line in errors.splitlines() if "mtptrain: " in line]
        assert "another process is gone or does not answer" in line
        assert "is saved; continue with resume=auto" in line
    again = finish(start(light, tmp_path / "run", 29613, launcher))
    assert [code for code, _ in again] == [0, 0], again
    assert "continuing from step" in again[0][1]
    left, right = head(tmp_path / "whole"), head(tmp_path / "run")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
