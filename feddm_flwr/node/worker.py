"""A real node's warm process: it keeps torch, diffusers and the images between messages.

Flower starts a fresh process for every message to a node, which would spend most of a short round on
imports. That process hands the job to a worker, over a socket in a folder of the user's own, and starts
the worker where there is none. The worker belongs to the SuperNode that it was started below, and ends
with it, or when it had nothing to do for a while. Whatever is wrong with it, the job is done all the
same, in the process that has it. The node config's `worker=false` turns it off.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
from filelock import FileLock

import feddm_flwr
from feddm_flwr.config import ConfigError, parse
from feddm_flwr.node.account import Account, allowed_data
from feddm_flwr.node.secure import SecureNode
from feddm_flwr.node.settings import node_name, node_state_root, wants_worker
from feddm_flwr.protocol.tasks import REFERENCE, Frames, TrainTask

log = logging.getLogger(__name__)

_PACKAGE = Path(feddm_flwr.__file__).parent

_START = 60.0  # seconds that a worker may take to start
_BUSY = 3.0  # seconds to wait for one that works for another run
_IDLE = 600.0  # seconds after which one ends that has nothing to do
_LONGEST_PATH = 100  # bytes of a socket's path that every system takes


@dataclass(frozen=True)
class Job:
    """A task of the server's as it came; scalars and bytes only."""

    run_config: dict[str, Any]
    node_config: dict[str, Any]
    task: dict[str, Any]
    frames: dict[str, bytes]


Result = tuple[dict[str, Any], Frames]  # what the server is told, and the frames


class JobFailedError(RuntimeError):
    """The job raised an error, which is in the node's own log; the message is what the server may know of it."""


def do(job: Job) -> Result:
    """Does a job, in the node's worker where there is one to be had, else here.

    Raises:
        JobFailedError: it failed. In a simulation, whose log is the user's own, whatever the job raised.
    """
    owner = _super_node()
    if owner and wants_worker(job.node_config):
        try:
            with _connected(owner) as connection:
                _send(connection, {**asdict(job), "frames": [*job.frames]}, [*job.frames.values()])
                answer = json.loads(connection.recv_bytes())
                if "error" in answer:
                    raise JobFailedError(answer["error"])
                return answer["report"], {name: connection.recv_bytes() for name in answer["frames"]}
        except (OSError, EOFError, ValueError) as error:
            log.warning("no worker did the job (%s: %s); it is done without", type(error).__name__, error)
    try:
        return _do_here(job)
    except Exception as error:
        if not owner and Path(sys.argv[0]).name != "flwr-clientapp":  # which a real node may start by itself
            raise
        log.exception("the job failed")
        raise JobFailedError(told(error)) from None


def told(error: Exception) -> str:
    """Returns what the server is told of an error on a real node: nothing that may name a file."""
    kind, text = type(error).__name__, error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, ConfigError) or (text and os.sep not in text):  # a ConfigError's text is meant for the server
        return f"{kind}: {text}"
    return f"{kind}; the node's own log says more"


def _do_here(job: Job) -> Result:
    from feddm_flwr.compute.cuda_graph import release_memory
    from feddm_flwr.node import evaluate, train

    config, name, root = parse(job.run_config), node_name(job.node_config), node_state_root(job.node_config)
    data = allowed_data(config, job.node_config, name, trains=job.task.get("kind") != REFERENCE)
    if "kind" in job.task:
        outcome = evaluate.do(config, name, data, root, job.task, job.frames)
    else:
        account = Account(config, job.node_config, name, data, root) if config.privacy.of_images else None
        task = TrainTask.from_record(job.task)
        secure = SecureNode(config, job.node_config, name, task.run_uuid) if config.privacy.secure_aggregation else None
        outcome = train.do(config, name, data, root, task, job.frames, account, secure)
    release_memory()  # of a GPU: other nodes of a simulation, and the server, need it next
    return outcome.report, outcome.frames


def process() -> str:
    """Returns which process the SuperNode is, for the server to notice when it was started anew; "" where there is
    none."""
    owner = _super_node()
    return _identity(owner.pid) if owner else ""


def _identity(pid: int) -> str:
    """Returns what tells a process from every other of this machine: its start in ticks since boot, where the system
    has that, since clocks are set."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return f"{pid} {stat.rpartition(')')[2].split()[19]}"
    except FileNotFoundError:
        return f"{pid} {psutil.Process(pid).create_time():.0f}"


def _super_node() -> psutil.Process | None:
    """Returns the SuperNode that this process was started by; none in a simulation, whose processes stay anyway."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if any(Path(part).name == "flower-supernode" for part in process.cmdline()[:3]):
                return process
    return None


@contextlib.contextmanager
def _connected(owner: psutil.Process) -> Iterator[Connection]:
    """Yields a connection to the node's worker, which waits for a job.

    Raises:
        OSError: there is none to be had: it does not start, is at work, or is of another user.
    """
    address = str(_folder() / f"{owner.pid}-{_code()}.sock")
    if len(address.encode()) > _LONGEST_PATH:
        raise OSError(f"{address!r} is too long for a socket")
    with FileLock(f"{address}.lock", timeout=_START):  # one of several processes starts it
        connection = _connect(address) or _start(address, owner)
    with connection:
        if not connection.poll(_BUSY):
            raise OSError("the worker is busy")
        connection.recv_bytes()  # that it is ready
        yield connection


def _folder() -> Path:
    """Returns where sockets lie; nobody else may write, or read, there.

    Raises:
        PermissionError: somebody else made it.
    """
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"feddm-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _code() -> str:
    """Returns what tells this code from another app's, or another version's: Flower has a folder for each."""
    from hashlib import sha256

    files = sorted((str(path), path.stat().st_mtime_ns) for path in _PACKAGE.rglob("*.py"))
    return sha256(f"{sys.executable} {files}".encode()).hexdigest()[:16]


def _connect(address: str) -> Connection | None:
    try:
        return Client(address, "AF_UNIX")
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def _start(address: str, owner: psutil.Process) -> Connection:
    """Starts a worker and waits until it listens."""
    Path(address).unlink(missing_ok=True)  # of one that was killed
    parts = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "feddm_flwr.node.worker", address, _identity(owner.pid)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(parts)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # it outlives the process that starts it
    )
    deadline = time.monotonic() + _START
    while not (connection := _connect(address)):
        if process.poll() is not None:
            raise OSError(f"the worker ended at once, with exit code {process.returncode}")
        if time.monotonic() > deadline:
            process.kill()
            raise OSError(f"the worker did not start within {_START:g} s")
        time.sleep(0.05)
    return connection


def _send(connection: Connection, header: dict[str, Any], blobs: list[bytes]) -> None:
    connection.send_bytes(json.dumps(header).encode())
    for blob in blobs:
        connection.send_bytes(blob)


class _Life:
    """Ends this process with its owner, or when it was idle for too long."""

    def __init__(self, owner: str, address: str) -> None:
        self.address, self.since, self.working = address, time.monotonic(), False
        self._owner = owner
        Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._owned() and (self.working or time.monotonic() - self.since < _IDLE):
            time.sleep(1.0)
        self.end()  # even in the middle of a job: its node is gone

    def end(self) -> None:
        for path in (self.address, f"{self.address}.lock"):
            Path(path).unlink(missing_ok=True)
        os._exit(0)

    def _owned(self) -> bool:
        try:
            return _identity(int(self._owner.split()[0])) == self._owner
        except (psutil.Error, OSError):  # it ends just now
            return False


def serve(address: str, owner: str) -> None:
    """Does jobs one after the other for the processes of a SuperNode."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with Listener(address, "AF_UNIX", backlog=8) as listener:
        life = _Life(owner, address)
        while True:
            with contextlib.suppress(OSError, EOFError, ValueError), listener.accept() as connection:
                connection.send_bytes(b"ready")
                job = json.loads(connection.recv_bytes())
                job["frames"] = {name: connection.recv_bytes() for name in job["frames"]}
                life.working = True
                try:
                    report, frames = _do_here(Job(**job))
                    _send(connection, {"report": report, "frames": [*frames]}, [*frames.values()])
                except Exception as error:
                    log.exception("the job failed")
                    _send(connection, {"error": told(error)}, [])
                    life.end()  # what it leaves on a GPU may spoil every later job
            life.working, life.since = False, time.monotonic()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
