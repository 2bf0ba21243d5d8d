"""Starting and following a run: what `feddm run` does around `flwr run`.

A simulation gets a SuperLink of its own, with a private FLWR_HOME and port, that ends with it.
Flower's shared local SuperLink would keep the folder, environment and Python of whoever started it
first, outlive the run, and run this code with another project's packages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import tomli_w

import feddm_flwr
from feddm_flwr.cli.app import write
from feddm_flwr.cli.failure import cause
from feddm_flwr.cli.progress import Display
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.reporting.records import nest, status_of

#: Exit code of a run that was stopped by Ctrl-C, SIGTERM or a closed terminal.
STOPPED = 130
_START_TIMEOUT = 60.0
_LONGEST = 24  # characters of a folder that sockets of Ray are in: it adds up to 83
_FILES, _FEWEST_FILES = 4096, 256  # that may be open
_SENT = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")  # what Flower sends of an app
_DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/kfd", "/dev/dxg")  # one is there where a GPU is


def find_app(folder: Path | None) -> Path | None:
    """Returns the folder whose `pyproject.toml` describes this Flower app: the one that is named, else the working
    folder or the clone that the package is installed from; None where there is but the installed package.

    Raises:
        ConfigError: the one that is named is none.
    """
    own = [Path(os.environ["FEDDM_APP"])] if os.environ.get("FEDDM_APP") else []  # as in our images
    for candidate in [folder] if folder else [Path.cwd(), *own, Path(feddm_flwr.__file__).parent.parent]:
        file = candidate / "pyproject.toml"
        if file.is_file() and "feddm_flwr.server_app:app" in file.read_text(encoding="utf-8"):
            return candidate.resolve()
    if folder:
        raise ConfigError(
            f"--app = {str(folder)!r}: no pyproject.toml of this app there; name the folder you cloned, or that feddm "
            "new has written"
        )
    return None


def is_local(superlink: str | None) -> bool:
    """Tells whether the connection is (or falls back to) Flower's local simulation."""
    file = Path(os.environ.get("FLWR_HOME") or os.path.expanduser("~/.flwr")) / "config.toml"  # noqa: PTH111 (needs no home)
    try:
        connections = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {}) if file.is_file() else {}
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    name = superlink or connections.get("default", "local")
    if name == "local" and name not in connections:
        return True
    if not isinstance(connections.get(name), dict):
        known = ", ".join(k for k in connections if k != "default") or "none"
        raise ConfigError(f"SUPERLINK = {name!r}: no such connection in {file}; it has {known}")
    return str(connections[name].get("address", ":local:")).startswith(":local")


def environment(*, telemetry: bool) -> dict[str, str]:
    """Returns the environment for Flower's processes: this Python's commands first, nothing fetched, and no usage
    reports unless asked for."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env |= {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",  # the log is parsed
        "PYTHONIOENCODING": "utf-8",
    }
    for name in ("NO_PROXY", "no_proxy"):  # a simulation talks to itself
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1", "localhost"]))
    if not telemetry:
        env |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return env


def end_by_signal() -> None:
    """Lets SIGTERM and a closed terminal end a run as Ctrl-C does: stopped, with nothing left behind."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup has a run go on
            signal.signal(name, stop)


class Remote:
    """The nodes of a SuperLink that runs elsewhere, by the name of its connection."""

    def __init__(self, options: argparse.Namespace, env: Mapping[str, str]) -> None:
        self.env, self.arguments, self.local = env, [options.superlink] if options.superlink else [], False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Simulation:
    """A SuperLink for one simulation, in a folder of its own, ended with it."""

    def __init__(self, options: argparse.Namespace, env: Mapping[str, str]) -> None:
        cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1
        there, cluster = _count_gpus(), os.environ.get("RAY_ADDRESS")
        _check_cluster(cluster) if cluster else _allow_files()
        gpus = options.client_gpus if options.client_gpus is not None else float(there > 0)
        # Where nvidia-smi is not, Ray may still find some.
        if gpus > there and not cluster and (there or not any(Path(p).exists() for p in _DRIVERS)):
            raise ConfigError(f"--client-gpus = {gpus:g}: must be at most {there}, the GPUs of this machine")
        federation = {
            "num-supernodes": options.num_supernodes,
            "client-resources-num-cpus": options.client_cpus if cluster else min(options.client_cpus, cores),
            "client-resources-num-gpus": gpus,
        }
        if not cluster:  # one actor per core at most, and no more actors than nodes
            federation["init-args-num-cpus"] = min(cores, options.num_supernodes * options.client_cpus)
        text = " ".join(f"{key}={value}" for key, value in federation.items())
        self.env, self.arguments, self.local = dict(env), ["own", "--federation-config", text], True

    def __enter__(self) -> Self:
        self._sockets = Path(tempfile.mkdtemp(prefix="feddm-", dir=_short_folder()))
        self._home = Path(tempfile.mkdtemp(prefix="feddm-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.env["FLWR_HOME"] = str(self._home)
        if "RAY_ADDRESS" not in self.env:
            self.env["RAY_TMPDIR"] = str(self._sockets)
        connection = f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (self._home / "config.toml").write_text(connection, encoding="utf-8")
        self._log = (self._home / "superlink.log").open("wb")
        self._process = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C stops the run first, then this
        )
        try:
            self._wait(port)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"http://127.0.0.1:{port}/health", timeout=1
                ):
                    return
            except OSError:
                time.sleep(0.1)
        log = (self._home / "superlink.log").read_text(errors="replace").splitlines()
        why = cause("", log) or "\n".join(log[-5:])
        raise ChildProcessError(f"the simulation's SuperLink did not start: {why}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C may not leave processes behind.
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {name: signal.signal(name, signal.SIG_IGN) for name in names}
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
        # A simulation that was stopped leaves Ray's processes behind, in sessions of their own. They
        # have our environment; those that Ray renames can no longer show it, but are their children.
        family: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == self.env["FLWR_HOME"]:
                    family += [process, *process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=5)  # what they hold, such as a run's folder, is free then
        self._log.close()
        for folder in (self._home, self._sockets):
            shutil.rmtree(folder, ignore_errors=True)
        for name, handler in before.items():
            signal.signal(name, handler)


def _short_folder() -> Path:
    """Returns a folder for Ray's sockets, whose paths may have 107 characters; those of Slurm's TMPDIR have more."""
    own = tempfile.gettempdir()
    for folder in (own, os.environ.get("XDG_RUNTIME_DIR", own), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) <= _LONGEST and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise ConfigError(f"TMPDIR = {own!r}: is too long for sockets; set it to a folder of at most {_LONGEST} characters")


def _check_cluster(address: str) -> None:
    """Checks that a cluster answers, for which Ray would wait for ever.

    Raises:
        ConfigError: none does.
    """
    if not (found := re.fullmatch(r"(.+):(\d+)", address)):  # auto, or a client's ray://
        return
    try:
        socket.create_connection((found[1].removeprefix("ray://"), int(found[2])), 10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"RAY_ADDRESS = {address!r}: no cluster of Ray answers there ({error}); unset it to use this machine alone"
        ) from error


def _allow_files() -> None:
    """Lets this process and those that it starts open as many files as Ray needs, for want of which it would wait.

    Raises:
        ConfigError: the system does not allow that.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, _FILES) if hard != resource.RLIM_INFINITY else _FILES
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < _FEWEST_FILES:
        raise ConfigError(f"ulimit -n = {most} is not allowed: a simulation needs at least {_FEWEST_FILES} open files")


def _count_gpus() -> int:
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def follow(
    app: Path | None,
    federation: Remote | Simulation,
    overrides: Mapping[str, object],
    config: RunConfig,
    *,
    verbose: bool,
) -> int:
    """Submits the run and shows its progress; returns 0 only if it completed."""
    run_id, tail, completed = "", deque[str](maxlen=200), False
    run = Path(str(overrides.get("out-dir", "runs")), str(overrides.get("run-name", "")))
    with tempfile.TemporaryDirectory(prefix="feddm-") as folder, Display(config) as display:
        # As a file: Flower's `-c` has no quoting, and loses keys when it is given twice.
        file = Path(folder) / "run.toml"
        file.write_text(tomli_w.dumps(nest(overrides)), encoding="utf-8")
        staged = _staged(app, Path(folder))
        process = subprocess.Popen(
            ["flwr", "run", str(staged), *federation.arguments, "--stream", "-c", str(file)],
            env=federation.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail.append(line)
                # The first is Flower's own: what a node says comes later.
                if not run_id and (found := re.search(r"Successfully started run (\d+)", line)):
                    run_id = found[1]
                if verbose:
                    display.print(line.rstrip())
                display.take(line)
                # The app's last line: what Flower and Ray put in order after it takes seconds, and is thrown away here.
                if federation.local and re.match("feddm: (model|report)=", line) and status_of(run) == "completed":
                    completed = True
                    break
            else:
                process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # a terminal that was closed
                display.print("stopping the run …")
            done = flwr(federation, "stop", run_id) if run_id else None
            command = " ".join(["flwr stop", run_id or "RUN_ID", *federation.arguments])
            stopped = federation.local or (done and done.returncode == 0)
            with contextlib.suppress(OSError):
                display.print("stopped" if stopped else f"the run may still go on; to stop it: {command}")
            return STOPPED
        finally:
            process.kill()
    if not run_id:
        why = cause("", tail) or next((line.strip() for line in reversed(tail) if line.strip()), "Flower says nothing")
        print("".join(tail), f"feddm: the run could not be submitted: {why}", sep="\n", file=sys.stderr)
        return 1
    status, details = ("finished:completed", "") if completed else _status(run_id, federation)
    if status == "finished:completed":
        display.summary(run, local=federation.local)
        return 0
    if status.startswith("finished"):
        why = cause(details, tail)
        if not verbose and not why:
            print("".join(tail), file=sys.stderr)
        print(f"feddm: the run failed ({status}): {why or 'see the log above'}", file=sys.stderr)
    else:
        where = " ".join([run_id, *federation.arguments[:1]])
        print(f"feddm: the log broke off ({status}); if the run goes on: flwr log {where}", file=sys.stderr)
    return 1


def _staged(app: Path | None, folder: Path) -> Path:
    """Returns a copy of what Flower may send of the app, or of the installed package. It looks at every file of the
    folder that it is given, and those of a virtual environment there cost it 8 s."""
    if not app:
        write(folder / "feddm-flwr")
        return folder / "feddm-flwr"

    def left_out(place: str, names: list[str]) -> list[str]:
        return [name for name in names if not _may_be_sent(Path(place, name))]

    return Path(shutil.copytree(app, folder / app.name, ignore=left_out))


def _may_be_sent(path: Path) -> bool:
    if path.is_dir():
        return not (path.name.startswith(".") or path.is_symlink() or (path / "pyvenv.cfg").exists())
    return path.is_file() and (path.suffix in _SENT or path.name in ("LICENSE", ".gitignore"))


def flwr(federation: Remote | Simulation, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of Flower's; the connection is its last argument."""
    line = ["flwr", command, *arguments, *federation.arguments[:1]]
    return subprocess.run(line, env=federation.env, capture_output=True, encoding="utf-8", check=False)


def _status(run_id: str, federation: Remote | Simulation) -> tuple[str, str]:
    """Returns the run's status and its details, as `flwr ls` tells them."""
    status, details = "unknown", ""
    for _ in range(20):  # the log's end comes a moment before the status
        listed = flwr(federation, "ls", f"--run-id={run_id}", "--format=json").stdout
        try:
            run = json.loads(listed)["runs"][0]
        except (ValueError, LookupError):
            return "unknown", listed.strip()
        status, details = str(run["status"]), str(run["status-details"])
        if status.startswith("finished"):
            break
        time.sleep(0.5)
    return status, details.removeprefix("Simulation failed with exception: ")
