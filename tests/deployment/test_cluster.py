"""A simulation on a Ray cluster that is there already, of two nodes on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import ROOT, wait

BIN = Path(sys.executable).parent
JOB = 'strategy="feddm-lean" model.preset="tiny" num-server-rounds=2 train.local-steps=3 sample.every=0 sample.steps=2'


def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster whose two nodes have a core each."""
    at = address()
    one = ["--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    head = ["--head", f"--port={at.rpartition(':')[2]}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    started = []
    # Paths of sockets must be short.
    with (tmp_path / "ray.log").open("wb") as log, tempfile.TemporaryDirectory(prefix="ray-") as short:
        try:
            for own in ([*head, f"--temp-dir={short}"], [f"--address={at}", "--node-ip-address=127.0.0.2"]):
                line = [BIN / "ray", "start", *own, *one]
                started.append(
                    subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                )
                nodes = len(started)
                wait(lambda nodes=nodes: status(at).count(" 1 node_") == nodes, f"node {nodes} of the cluster", 60)
            yield at
        finally:
            for process in reversed(started):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)


def status(at: str) -> str:
    line = [BIN / "ray", "status", f"--address={at}"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout


def run(folder: Path, name: str, at: str | None) -> str:
    env = {**os.environ, "XDG_STATE_HOME": str(folder / "state")} | ({"RAY_ADDRESS": at} if at else {})
    line = [BIN / "feddm", "run", "local", "--app", ROOT, "-c", JOB, "-c", f'run-name="{name}" out-dir="{folder}"']
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return hashlib.sha256((folder / name / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def test_a_ray_cluster_gives_the_same_bits_and_goes_on(cluster: str, tmp_path: Path) -> None:
    assert run(tmp_path, "there", cluster) == run(tmp_path, "here", None)
    assert status(cluster).count(" 1 node_") == 2
