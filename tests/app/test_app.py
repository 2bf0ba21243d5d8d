"""The product as its users start it: real runs through Flower, as processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from local_grid import row
from PIL import Image

from feddm_flwr.cli import launch
from feddm_flwr.cli.main import main
from feddm_flwr.cli.options import parser
from feddm_flwr.config import ConfigError, flatten, parse
from feddm_flwr.protocol.replies import Introduction
from feddm_flwr.reporting.records import status_of, write_status
from feddm_flwr.reporting.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
QUICK = (
    'model.preset="tiny" num-server-rounds=2 train.local-steps=10 train.warmup-steps=5 sample.steps=10 sample.count=9 '
    "train.learning-rate=5e-3"
)
#: One process for all simulated nodes, which spares another's start.
ONE_ACTOR = ("--client-cpus", str(os.cpu_count()))


def feddm(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [BIN / "feddm", *arguments]
    env = env or own_environment(cwd)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def own_environment(folder: Path) -> dict[str, str]:
    """Without the connections that whoever runs the tests may have."""
    return {**os.environ, "FLWR_HOME": str(folder / "no-flower-home")}


def train(
    folder: Path, name: str, config: str = "", *arguments: str, env: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """`feddm run` with a quick configuration; the outcome and the run's folder."""
    done = feddm("run", *arguments, "-c", QUICK, "-c", f'run-name="{name}" {config}', cwd=folder, env=env)
    return done, folder / "runs" / name


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checksum(run: Path) -> str:
    return hashlib.sha256((run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("-app's größe [2] #%20")


@pytest.fixture(scope="module")
def vanilla(folder: Path) -> Path:
    done, run = train(folder, "vanilla", 'strategy="feddm-vanilla"')
    assert done.returncode == 0, done.stdout + done.stderr
    for place in (run / "model", run / "samples" / "round-0002.png", run / "report.html"):
        assert str(place) in done.stdout
        assert place.exists()
    return run


def test_a_run_leaves_what_it_promises(vanilla: Path) -> None:
    lines = rows(vanilla)
    config = tomllib.loads((vanilla / "config.toml").read_text())
    assert (config["train"]["local-steps"], config["train"]["warmup-steps"], config["sample"]["count"]) == (10, 5, 9)
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert lines[1]["eval_loss"] < lines[0]["eval_loss"]
    assert all(line["clients_ok"] == 4 and line["clients_failed"] == 0 for line in lines)
    assert json.loads((vanilla / "status.json").read_text())["status"] == "completed"
    assert list((vanilla / "tensorboard").glob("events.*"))
    with Image.open(vanilla / "samples" / "round-0002-raw.png") as grid:
        assert grid.size == (176, 176)
    report = (vanilla / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report
    assert "node-3" in report


def test_the_model_loads_with_diffusers_alone(vanilla: Path) -> None:
    code = (
        f"from diffusers import DDPMPipeline; p = DDPMPipeline.from_pretrained({str(vanilla / 'model')!r});"
        "import sys; print(p(batch_size=1, num_inference_steps=5).images[0].size, 'feddm_flwr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "(8, 8) False"


def test_strategies_are_swapped_by_run_config(vanilla: Path, folder: Path, tmp_path: Path) -> None:
    job = tmp_path / ("of a job, as Slurm names it " + "x" * 60)
    job.mkdir()
    env = own_environment(folder) | {"TMPDIR": str(job), "PYTHONIOENCODING": "ascii"}
    done, run = train(folder, "lean", 'strategy="feddm-lean"', *ONE_ACTOR, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(job.iterdir()) == []
    for line, of_vanilla in zip(rows(run), rows(vanilla), strict=True):
        assert line["train_loss"] == pytest.approx(of_vanilla["train_loss"], rel=0.15)
        assert line["bytes_up_fp32"] >= 10 * line["bytes_up"]
        assert line["bytes_down_fp32"] >= 10 * line["bytes_down"]
    assert checksum(run) != checksum(vanilla)
    assert re.search(r"sent by the nodes: \S+ \S+, \S+x less than float32, \S+x less than gradients", done.stdout)
    # Nodes of a simulation leave nothing behind but decoded images, which other runs share.
    assert {path.name for path in tmp_path.glob("xdg-state/feddm/*")} == {"cache"}


def test_flwr_run_repeats_a_run_by_its_config_file_to_the_same_bits_with_one_actor(
    vanilla: Path, folder: Path, tmp_path: Path
) -> None:
    """Plain Flower, its own local SuperLink and its run-time installation included."""
    env = private_flower(tmp_path / "flower-home")  # whose path may not have every character
    out, config = folder / "plain", folder / "plain.toml"
    config.write_text(re.sub(r"(?m)^out-dir = .*$", f'out-dir = "{out}"', (vanilla / "config.toml").read_text()))
    one_actor = f"num-supernodes=4 client-resources-num-cpus={os.cpu_count()}"
    try:
        done = subprocess.run(
            ["flwr", "run", str(ROOT), "--stream", "--federation-config", one_actor, "-c", str(config)],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=folder,
        )
        assert "report=" in done.stdout, done.stdout + done.stderr
    finally:
        end_superlink(int(env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]))
    (run,) = out.iterdir()
    assert run.name.startswith("feddm-vanilla-")
    assert checksum(run) == checksum(vanilla)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def private_flower(home: Path) -> dict[str, str]:
    home.mkdir()
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }


def end_superlink(port: int) -> None:
    """End the SuperLink of that port, by its pid, and what it started."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any("flower-superlink" in part for part in line) and str(port) in line:
            end(process)


def end(process: psutil.Process) -> None:
    family = [*process.children(recursive=True), process]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # a parent may have ended it
            one.terminate()
    for one in psutil.wait_procs(family, timeout=10)[1]:
        one.kill()


def test_samples_are_drawn_as_grid_folder_and_array(
    vanilla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = ["sample", str(vanilla), "-n", "5", "--steps", "4", "--seed", "3", "-o"]
    done = feddm(*drawing, "grid.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert main([*drawing, "folder/"]) == main([*drawing, "images.npz"]) == 0
    images = np.load(tmp_path / "images.npz")["images"]
    assert images.shape == (5, 8, 8, 1)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "folder" / f"{i:05d}.png") as written:
            assert (np.asarray(written) == image[..., 0]).all()
    assert (tmp_path / "grid.png").exists()


def test_a_second_run_of_a_process_can_be_stopped_as_the_first() -> None:
    def stop(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with launch.Simulation(
            parser().parse_args(["run", "--num-supernodes", "2", "--client-cpus", "1"]),
            launch.environment(telemetry=False),
        ):
            pass
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "-c", 'num-server-rounds="two"'], "num-server-rounds = 'two' is not allowed: must be an integer"),
        (["run", "-c", "train.learnig-rate=1.0"], "train.learnig-rate = 1.0: no such key; did you mean"),
        (["run", "-c", "data.alpha=oops"], "data.alpha = 'oops' is not allowed: must be a number"),
        (["run", "-c", "oops"], "--run-config 'oops': must be 'key=value key=\"text\"' or a .toml file"),
        (["run", "-c", "seed=1 num-server-rounds ="], "not so from 'num-server-rounds ='"),
        (["run", "-c", "nothing.toml"], "--run-config 'nothing.toml' cannot be read: No such file"),
        (["run", "--num-supernodes", "1"], "min-nodes = 2 is not allowed: must be at most --num-supernodes = 1"),
        (["run", "nowhere"], "SUPERLINK = 'nowhere': no such connection"),
        (["run", "--app", "."], "--app = '.': no pyproject.toml of this app there"),
        (["run", "--num-supernodes", "0"], "argument --num-supernodes: invalid positive integer value: '0'"),
        (["sample", "nothing"], "MODEL_OR_RUN = 'nothing': no run with a model/"),
        (["run", "--resume", "nothing"], "--resume 'nothing': not a run's folder"),
        (["run", "-c", "resume=true"], "run-name = '' with resume = true: must name the run to go on with"),
        (["run", "-c", 'resume=true run-name="x"'], "run-name = 'x' with resume = true: there is no "),
        (["certs", "keys"], "certs: name the SuperLink with --host, and nodes with --node"),
        (["certs", "keys", "--host", "a b"], "--host 'a b' is not allowed: must be a host name or an IP address"),
        (["certs", "keys", "--node", "../x"], "--node '../x' is not allowed"),
        (["evaluate", "nothing"], "MODEL_OR_RUN = 'nothing': no run with a model/"),
        (["data", "./nothing"], "data.name = './nothing': no such file or folder"),
        (["data", "digits", "-o", "x.jpg"], "--output = 'x.jpg': must end in .png"),
        (["data", ""], "data.name = '' is not allowed"),
        (["run", "-c", "seed=3 seed=4"], "--run-config 'seed=3 seed=4': seed is there twice"),
        (["run", "-c", 'out-dir="/dev/null/x"'], "out-dir = '/dev/null/x': nothing can be written there (Not a dir"),
        (["run", "-c", 'model.init-from="./no"'], "model.init-from = './no': no such file or folder"),
        (["run", "--client-gpus", "64"], "--client-gpus = 64: must be at most"),
        (["sample", "x", "--guidance", "nan"], "--guidance: invalid number that is not negative value: 'nan'"),
        (["sample", "x", "-o", "/dev/null/x.png"], "--output = '/dev/null/x.png': nothing can be written there"),
        (["report", "nothing"], "RUN = 'nothing': not a run's folder"),
        (
            ["run", "-c", 'data.name="./no" data.image-size=8 data.channels=1'],
            "data.name = './no': no such file or folder",
        ),
        (
            ["run", "-c", "fraction-train=0.5 min-replies=4"],
            "min-replies = 4 is not allowed: a round needs 4 replies and asks 2 nodes (fraction-train = 0.5",
        ),
        (
            ["run", "--num-supernodes", "2", "-c", 'server.aggregation="median"'],
            "server.aggregation = 'median' is not allowed: a round needs 3 replies and asks 2 nodes",
        ),
        (["run", "-c", 'out-dir="~nobody-at-all/x"'], "'~nobody-at-all/x': '~nobody-at-all' is nobody's home folder"),
    ],
)
def test_wrong_input_is_refused_at_once(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "no-flower-home"))
    try:
        code = main(arguments)
    except SystemExit as ended:  # argparse's way
        code = int(ended.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_flower_default_is_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "site"\n[superlink.site]\naddress = "127.0.0.1:1"\n')
    assert not launch.is_local(None)
    with pytest.raises(ConfigError, match="SUPERLINK = 'default': no such connection"):
        launch.is_local("default")
    assert main(["run", "--num-supernodes", "3"]) == 2


def test_what_was_over_stays_so_when_its_resumption_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(flatten(parse({})), None)
    run.log_nodes([asdict(Introduction(f"node-{i}", 9, 1, {})) for i in range(3)])  # one did not introduce itself
    run.log_round(row(1, connected=4))
    monkeypatch.setattr(launch.Simulation, "_wait", lambda self, port: signal.raise_signal(signal.SIGINT))
    for before in ("running", "completed", "failed"):
        if before != "running":  # then another process, this one, has it open
            run.finish(before)
        assert main(["run", "--resume", str(run.path)]) == 130
        assert status_of(run.path) == before
    monkeypatch.setattr(launch.Simulation, "_wait", lambda self, port: None)
    monkeypatch.setattr(launch, "follow", lambda *_, **__: launch.STOPPED)
    run.finish("completed")
    assert main(["run", "--resume", str(run.path)]) == 130
    assert status_of(run.path) == "completed"
    write_status(run.path, "running")  # and nobody has it open: it was killed
    assert main(["run", "--resume", str(run.path)]) == 130
    assert json.loads((run.path / "status.json").read_text())["status"] == "stopped"
    capsys.readouterr()
    assert main(["run", "--resume", str(run.path), "--num-supernodes", "8"]) == 2
    assert "--num-supernodes = 8: the run to resume has 4; its images would be shared" in capsys.readouterr().err
    monkeypatch.chdir("/proc")  # where nothing can be written
    assert main(["report", str(run.path)]) == 0
    assert main(["report", str(run.path), "-o", "x.html"]) == 2
    assert "--output = 'x.html': is for several runs" in capsys.readouterr().err


def test_a_run_never_writes_over_another(vanilla: Path, folder: Path) -> None:
    done, _ = train(folder, "vanilla")
    assert done.returncode == 2
    assert "run-name = 'vanilla'" in done.stderr
    assert "exists; choose another name" in done.stderr


def test_a_run_whose_nodes_all_fail_is_a_failed_run(folder: Path) -> None:
    diverging = 'train.learning-rate=1e25 train.precision="fp32" max-round-retries=1'
    done, run = train(folder, "diverged", diverging, *ONE_ACTOR)
    assert done.returncode == 1
    assert "0 of 4 nodes gave a good reply, 3 are needed (4 exception); gave up after 2 attempts; node-" in done.stderr
    assert "the training loss of node-0 became nan in round 1" in done.stdout
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    assert not (run / "model").exists()


def start(folder: Path, name: str, config: str, *arguments: str) -> subprocess.Popen[str]:
    command = [BIN / "feddm", "run", *arguments, "-c", QUICK, "-c", f'run-name="{name}" {config}']
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it
    try:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=own_environment(folder),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def actor_at_work(process: subprocess.Popen[str]) -> psutil.Process:
    """A simulated client's process that is training, below the `feddm run` process."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                # Ray renames a process while it runs a method; an introduction uses next to no time.
                if child.cmdline()[:1] == ["ray::ClientAppActor.run"] and child.memory_info().rss > 400e6:
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError("no simulated client was seen at work")


def test_a_run_that_loses_a_client_process_and_is_stopped_leaves_nothing_behind_and_goes_on_to_the_same_bits(
    vanilla: Path, folder: Path
) -> None:
    long_end = "sample.count=400 sample.steps=200"  # or a slow machine has done the run before it is stopped
    process, run = start(folder, "stopped", long_end), folder / "runs" / "stopped"
    actor_at_work(process).kill()
    assert process.stdout
    before = []
    for line in process.stdout:
        before.append(line)
        if "asked again" in line:
            break
    assert "process-died" in "".join(before)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 3
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    nodes = "" if (run / "metrics.jsonl").exists() else " --num-supernodes 4"  # where no round was done
    assert f"to go on: feddm run --resume {shlex.quote(str(run))}{nodes}\n" in output
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    assert psutil.wait_procs(family, timeout=10)[1] == []
    short_end = ["-c", "sample.count=9 sample.steps=10"]
    done = feddm("run", "--resume", "runs/stopped", "--num-supernodes", "4", *short_end, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after round" in done.stdout
    assert [(line["round"], line["clients_ok"]) for line in rows(run)] == [(1, 4), (2, 4)]
    assert len(json.loads((run / "status.json").read_text())["resumed_after"]) == 1
    assert checksum(run) == checksum(vanilla)
