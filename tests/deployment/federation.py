"""A federation of real processes on loopback: a SuperLink and SuperNodes with TLS and authentication."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent.parent
#: A model that trains in a moment.
QUICK: dict[str, Any] = {
    "data.name": "shirts", "data.image-size": 16, "data.channels": 1, "model.preset": "tiny", "train.local-steps": 3,
    "train.batch-size": 8, "train.threads": 1, "sample.count": 4, "sample.steps": 4, "sample.every": 0,
}  # fmt: skip


def compose_command(service: str, values: Mapping[str, object], paths: Mapping[str, object]) -> list[str]:
    """The command line of a service in `docker/`, with the values of its variables and paths of this machine."""
    described = yaml.safe_load((ROOT / "docker" / f"{service}.compose.yaml").read_text())["services"][service]
    line = []
    for part in described["command"]:
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: str(values.get(found[1], "")), part)
        for path, here in paths.items():
            text = text.replace(path, str(here))
        line.append(text)
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error, OSError):
            if value := condition():
                return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:g} s for {what}")


class Federation:
    """Its processes, folders and logs; `close` ends all of them."""

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...] = ("north", "south", "east"),
        own: Callable[[Path, str], str] | None = None,
    ) -> None:
        """`own` is what a site says of itself, by the folder of all keys and its name."""
        self.folder, self.sites = folder, sites
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.out, self.keys, self.home = folder / "out", folder / "keys", folder / "home"
        self.home.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }
        trust = f'root-certificates = "{self.keys / "ca.crt"}"'
        (self.home / "config.toml").write_text(f'[superlink.site]\naddress = "{self.address}"\n{trust}\n')
        self.processes: dict[str, psutil.Popen] = {}
        nodes = (f"--node={site}" for site in sites)
        self.command("feddm", "certs", self.keys, "--host", "federation.example.org", *nodes)
        for index, site in enumerate(sites):
            self.make_images(site, index)
        self.start_superlink()
        for site in sites:
            self.register(site)
            self.start_node(site, own=own(self.keys, site) if own else "")

    def register(self, site: str) -> None:
        """Let the SuperLink know a node's key."""
        key = self.keys / "nodes" / f"{site}.pub"
        self.command("flwr", "supernode", "register", key, "site", "--name", site)

    def make_images(self, site: str, seed: int) -> None:
        """Twenty images of coarse patterns."""
        (self.folder / site / "images").mkdir(parents=True)
        random = np.random.default_rng(seed)
        for i in range(20):
            pixels = np.kron(random.integers(0, 256, (4, 4)), np.ones((4, 4))).astype(np.uint8)
            Image.fromarray(pixels).save(self.folder / site / "images" / f"{i}.png")

    def command(self, *line: object) -> str:
        """What a command prints that must succeed."""
        options: Any = {"env": self.environment, "cwd": self.folder, "capture_output": True, "text": True}
        done = subprocess.run([*map(str, line)], timeout=120, check=False, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def spawn(self, name: str, *line: object, **environment: str) -> psutil.Popen:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = psutil.Popen(
                [*map(str, line)],
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )
        return self.processes[name]

    def start_superlink(self) -> None:
        paths = {"/run/secrets": self.keys, "/var/lib/feddm": self.folder / "superlink"}
        line = compose_command("superlink", {}, {**paths, "0.0.0.0": "127.0.0.1", "8000": self.port})
        self.spawn("superlink", "flower-superlink", *line)
        wait(self._listens, "the SuperLink")

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def start_node(self, site: str, *, port: int = 0, ca: Path | None = None, key: str = "", own: str = "") -> None:
        """A SuperNode, which reaches the SuperLink by `port` where that is not its own, and is started again
        when it ends, as a service manager does."""
        paths = {
            "/run/secrets/ca.crt": ca or self.keys / "ca.crt",
            "/run/secrets/node.key": self.keys / "nodes" / (key or site),
            '"/data"': f'"{self.folder / site / "images"}"',
            "/var/lib/feddm/state": self.folder / f"{site}-state",
            "9094": free_port(),
        }
        values = {"SUPERLINK": f"127.0.0.1:{port or self.port}", "NODE_NAME": site, "NODE_CONFIG": own}
        line = ["flower-supernode", *compose_command("supernode", values, paths)]
        home = str(self.folder / f"{site}-home")
        self.spawn(site, "bash", "-c", 'while :; do "$@"; sleep 3; done', "bash", *line, FLWR_HOME=home)

    def run(self, *arguments: object, app: Path = ROOT, limit: float = 500, **keys: Any) -> tuple[int, str]:
        """`feddm run` to its end: the exit code and what it said."""
        process = self.start_run(*arguments, app=app, **keys)
        output, _ = process.communicate(timeout=limit)
        return process.returncode, str(output)

    def start_run(self, *arguments: object, app: Path = ROOT, **keys: Any) -> subprocess.Popen[str]:
        own = {name.replace("__", ".").replace("_", "-"): value for name, value in keys.items()}
        resumed = "--resume" in arguments
        config = own if resumed else QUICK | {"out-dir": str(self.out)} | own
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        line = ["feddm", "run", "site", "--app", app, *arguments, *(["-c", text] if text else [])]
        process = subprocess.Popen(
            [*map(str, line)],
            env=self.environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.processes["run"] = psutil.Process(process.pid)
        return process

    def server_app(self) -> psutil.Process:
        """The process of the run's ServerApp."""

        def find() -> psutil.Process | None:
            for process in psutil.process_iter(["cmdline"]):  # None where that cannot be had, as of a zombie
                line = process.info["cmdline"] or []
                if any("flwr-serverapp" in part for part in line) and any(str(self.port) in part for part in line):
                    return process
            return None

        found: psutil.Process = wait(find, "the ServerApp")
        return found

    def wait_for_task(self, site: str, before: str) -> None:
        """Wait until a node was given a task that it had not in its log `before`."""
        given = "Receiving: train message"
        wait(lambda: self.log(site).count(given) > before.count(given), f"a task for {site}")

    def kill(self, name: str) -> None:
        """SIGKILL, and what it had started with it, as where a machine loses its power."""
        kill_family(self.processes.pop(name))

    def stop(self, site: str) -> None:
        """SIGTERM, as its service manager sends it: the SuperLink knows at once that the node is gone, and lets it
        in again at once. One that was killed it takes for being there until it missed two of its heartbeats."""
        manager = self.processes.pop(site)
        nodes = manager.children()
        manager.kill()
        for node in nodes:
            node.terminate()
        for node in psutil.wait_procs(nodes, timeout=30)[1]:
            kill_family(node)

    def crash(self, site: str) -> None:
        """SIGKILL to a SuperNode; its service manager stays."""
        for child in self.processes[site].children():
            kill_family(child)

    def workers(self, site: str) -> list[psutil.Process]:
        """The warm processes of a node."""
        nodes = {str(child.pid) for child in self.processes[site].children()}
        found = [p for p in psutil.process_iter(["cmdline"]) if "feddm_flwr.node.worker" in (p.info["cmdline"] or [])]
        return [process for process in found if nodes & {part.split()[0] for part in process.info["cmdline"] if part}]

    def rows(self, name: str) -> list[dict[str, Any]]:
        file = self.out / name / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_round(self, name: str, number: int) -> None:
        wait(lambda: len(self.rows(name)) >= number, f"round {number} of {name}")

    def checksum(self, name: str) -> str:
        file = self.out / name / "model" / "unet" / "diffusion_pytorch_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def status(self, name: str) -> Mapping[str, Any]:
        status: Mapping[str, Any] = json.loads((self.out / name / "status.json").read_text())
        return status

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in [*self.processes.values()]:
            kill_family(process)
        for process in psutil.process_iter():  # those whose parent was killed
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME", "").startswith(str(self.folder)):
                    process.kill()


def kill_family(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
