"""Measures what is to be known of a GPU, in one command that goes on where the last one left off.

    python benchmarks/gpu.py --minutes 14 --out gpu --images fashion_mnist_train.parquet

A queue of jobs, one after the other and never two at a time, each with a limit of its own. `gpu/results.jsonl` has a
line for each that came to an end, written at once: what it found, or why it failed. What was found is not measured
again; what failed is, after the others. Quality comes last, in pieces that resume. `gpu.tar.gz` beside the folder has
all of it; `--take gpu.tar.gz` brings it to another machine. `--toy` does everything at a size for a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
_FEDDM = ["-c", "import sys; from feddm_flwr.cli.main import main; sys.exit(main())"]
_RESULTS = "results.jsonl"
_GRACE = 20.0  # seconds that a job has to save its state
_WITHIN = 60 << 20  # bytes of an archive: the largest files are left out of what is more


@dataclass(frozen=True)
class Job:
    """A command, and how what it found is read. `pieces`: it goes on where it was stopped. `anew`: what an earlier try
    left, which would be in its way."""

    name: str
    command: Sequence[object]
    limit: float
    read: Callable[[str], Any]
    pieces: bool = False
    anew: Path | None = None


def jobs(folder: Path, images: str, toy: bool) -> list[Job]:
    """Returns what there is to measure, that which is not known and quickly done first."""
    found = [Job("tests", ["-m", "pytest", "tests/test_gpu.py"], 240, lambda said: said.splitlines()[-1])]

    def measured(name: str, limit: float, script: str, *arguments: object) -> None:
        file = folder / f"{name}.json"
        command = [f"benchmarks/{script}.py", *arguments, "--out", file]
        found.append(Job(name, command, limit, lambda _: json.loads(file.read_text(encoding="utf-8"))))

    size = ["--steps", 1, "--times", 1] if toy else ["--steps", 30, "--times", 3]
    systems = ["fashionmnist-28-small"] if toy else ["cifar10-32", "fashionmnist-28"]
    for system in systems:
        for batch in ["2"] if toy else ["128", "256", "512"]:
            measured(f"throughput {system} {batch}", 120, "throughput", system, "--batch", batch, *size)
    measured("overhead", 180, "simulation", "overhead", "--nodes", 2 if toy else 10, "--steps", 2 if toy else 200)
    found += [_simulation(folder, at_once, toy) for at_once in ([1] if toy else [1, 2, 4])]
    measured("real nodes", 240, "round_overhead", "--rounds", 2 if toy else 4, "--nodes", 2 if toy else 3)
    for system in [] if toy else [*systems, "lsun-church-256"]:
        more = ["--batch", 32 if system.startswith("lsun") else 256, *size, "--compile"]
        measured(f"compiled {system}", 400, "throughput", system, *more)
    drawn = ["--samples", 4 if toy else 512, "--without-ddpm", "-c", 'data.name="digits"']
    measured("sampling", 120, "sampling", folder / "simulation" / "at-once-1", *drawn)
    kinds = ["toy"] if toy else ["fashionmnist", "fashionmnist-full"]
    return found + [_quality(folder, kind, images) for kind in kinds]


def _simulation(folder: Path, at_once: int, toy: bool) -> Job:
    """Returns four nodes that share a machine, so many at a time."""
    run = folder / "simulation" / f"at-once-{at_once}"
    keys = {
        "out-dir": str(run.parent),
        "run-name": run.name,
        "num-server-rounds": 2 if toy else 4,
        "model.preset": "tiny" if toy else "medium",
        "train.local-steps": 2 if toy else 200,
        "sample.every": 0,
        "sample.count": 4,
        "sample.steps": 2,
    }
    said = [part for key, value in keys.items() for part in ("-c", f"{key}={json.dumps(value)}")]
    share = [] if toy else ["--client-gpus", 1 / at_once]

    def read(_: str) -> Any:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {"seconds a round": [json.loads(line)["seconds"] for line in lines]}

    command = [*_FEDDM, "run", "--num-supernodes", 4, *share, *said]
    return Job(run.name, command, 180, read, anew=run)


def _quality(folder: Path, kind: str, images: str) -> Job:
    """Returns a comparison, whose runs go on from their checkpoints."""
    out = folder / "quality" / kind
    named = [] if kind == "toy" or not images else ["-c", f"data.name={json.dumps(images)}"]
    command = [*_FEDDM, "compare", ROOT / "benchmarks" / f"{kind}.toml", "-o", out, *named]

    def read(_: str) -> Any:
        return json.loads((out / "results.json").read_text(encoding="utf-8"))

    return Job(f"quality {kind}", command, 3600, read, pieces=True)


def done(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the last line of each job, by its name."""
    file = folder / _RESULTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["job"]: line for line in map(json.loads, lines)}


def work(folder: Path, queue: Sequence[Job], seconds: float) -> None:
    """Does what is not done, for so long."""
    end, before, facts = time.monotonic() + seconds, done(folder), machine.facts()
    left = [job for job in queue if "found" not in before.get(job.name, {})]
    for job in sorted(left, key=lambda job: (job.pieces, job.name in before)):
        rest = end - time.monotonic() - _GRACE
        if rest < (_GRACE if job.pieces else job.limit / 2):
            print(f"{job.name}: no time left", flush=True)
            continue
        if job.anew:
            shutil.rmtree(job.anew, ignore_errors=True)
        begun = time.monotonic()
        code, said = finished(job, min(job.limit, rest))
        line: dict[str, Any] = {"job": job.name, **facts, "seconds": round(time.monotonic() - begun, 1)}
        try:
            line |= {"found": job.read(said)} if code == 0 else {"failed": f"exit {code}: {said[-600:]}"}
        except (OSError, ValueError, IndexError) as error:
            line |= {"failed": f"{type(error).__name__}: {error}"}
        with (folder / _RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{job.name}: {'failed' if 'failed' in line else 'done'} in {line['seconds']} s", flush=True)


def finished(job: Job, limit: float) -> tuple[int, str]:
    """Returns the exit code of a job that has so many seconds, and what it said. Asked to end, it may save state."""
    line = [sys.executable, *map(str, job.command)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, env=environment(), **options)
    try:
        said, _ = process.communicate(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        process.send_signal(signal.SIGTERM)
        try:
            said, _ = process.communicate(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return 124, said
    return process.returncode, said


def environment() -> dict[str, str]:
    """Returns that of the jobs: the programs of this environment are found first."""
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def pack(folder: Path) -> Path:
    """Writes the files into an archive, the smallest first, as far as it may grow; returns its path."""
    archive = folder.with_name(f"{folder.name}.tar.gz")
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with tarfile.open(archive, "w:gz") as packed:
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > _WITHIN:
                print(f"left out of {archive.name}: {path.relative_to(folder)}")
                continue
            packed.add(path, path.relative_to(folder))
    return archive


def main() -> None:
    """Works through the queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", default="", help="data.name of Fashion-MNIST, where the hub is out of reach")
    parser.add_argument("--take", type=Path, help="an archive of an earlier call, to go on from")
    parser.add_argument("--toy", action="store_true", help="everything at a size for a CPU")
    parser.add_argument("--only", default="", help="jobs whose name begins so")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.take:
        with tarfile.open(options.take) as packed:
            packed.extractall(folder, filter="data")
    images = str(Path(options.images).resolve()) if Path(options.images).is_file() else options.images
    queue = [job for job in jobs(folder, images, options.toy) if job.name.startswith(options.only)]
    try:
        work(folder, queue, 60 * options.minutes)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    finally:
        print(pack(folder))


if __name__ == "__main__":
    main()
