"""What a simulation costs beside the training: a federated round against plain training on as many batches.

    python benchmarks/simulation.py overhead --out benchmarks/results/simulation.json
    python benchmarks/simulation.py scale --out benchmarks/results/scale.json

`overhead`: 10 nodes of 1,000 steps each on a GPU, or one core (the process is pinned to it), server and held-out losses
included, against the same loop alone on it. `scale`: 1,000 nodes, a tenth of them in each of 100 rounds of two
steps: seconds for each node's part, and memory of the server and of the processes that train, as rounds go by.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import psutil
import torch
from codec import one_core

BIN = Path(sys.executable).parent
OVERHEAD = {"train.batch-size": 32, "sample.every": 0, "sample.count": 1, "sample.steps": 1}
SCALE = {
    "model.preset": "tiny",
    "data.eval-fraction": 0.0,
    "fraction-train": 0.1,
    "train.local-steps": 2,
    "train.batch-size": 4,
    "strategy": "feddm-lean",
    "sample.every": 0,
    "sample.count": 1,
    "sample.steps": 1,
}


def run(folder: Path, nodes: int, keys: dict[str, Any]) -> Iterator[tuple[str, psutil.Process]]:
    """The lines of `feddm run` as they come, and its process."""
    said = [part for key, value in keys.items() for part in ("-c", f"{key}={json.dumps(value)}")]
    line = [BIN / "feddm", "run", "local", "--num-supernodes", str(nodes), *said, "-c", f'out-dir="{folder}"']
    env = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
    process = subprocess.Popen([*map(str, line)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    tail = []
    for text in process.stdout:
        tail.append(text)
        yield text, psutil.Process(process.pid)
    if process.wait():
        sys.exit("".join(tail[-30:]))


def rounds(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a run said of its rounds."""
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def overhead(nodes: int, steps: int, preset: str) -> dict[str, Any]:
    """On one core, or a GPU."""
    if not torch.cuda.is_available():
        one_core()
    keys = {**OVERHEAD, "model.preset": preset, "train.local-steps": steps, "num-server-rounds": 2, "run-name": "x"}
    before, ended = plain(steps, preset), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        for text, _ in run(Path(folder), nodes, keys):
            if re.match(r"round \d+/", text):
                ended.append(time.monotonic())  # with the server's step and the round's figures and grids
        first = rounds(Path(folder), "x")[0]["seconds"]
    after = plain(steps, preset)
    step = statistics.mean([before, after])
    second = ended[1] - ended[0]
    found = {"nodes": nodes, "steps": steps, "preset": preset, "round_seconds": second, "first_round_seconds": first}
    found |= {"plain_step_seconds": [before, after], "overhead": second / (nodes * steps * step) - 1}
    print(
        f"{nodes} nodes of {steps} steps: {second:.1f} s a round (the first {first:.1f} s), plain training "
        f"of as many {nodes * steps * step:.1f} s (a step {1e3 * before:.1f} ms before, {1e3 * after:.1f} ms after): "
        f"{100 * found['overhead']:+.1f} %"
    )
    return found


def plain(steps: int, preset: str) -> float:
    """Seconds of a step of the loop alone, in a process of its own."""
    keys = {**OVERHEAD, "model.preset": preset, "train.local-steps": steps, "train.threads": 1}
    code = f"""
import json, sys, time
from pathlib import Path
import tempfile
from feddm_flwr.compute.device import prepare_process
from feddm_flwr.config import parse
from feddm_flwr.data.node_data import load_node
from feddm_flwr.models import networks
from feddm_flwr.training import examples, loop, objectives
config = parse(json.loads({json.dumps(json.dumps(keys))}))
device = prepare_process(config.train)
with tempfile.TemporaryDirectory() as folder:
    own = load_node(config.data, config.seed, (0, 1), None, Path(folder))
    network = networks.build(config, {{}}).to(device)
    objective = objectives.Denoising(config, examples.Pixels(own.train, False, device), own.train_labels, device)
    for number in (1, 2):
        start = time.monotonic()
        loop.train(network, objective, config, "node", loop.Progress(number, 0), device)
    print((time.monotonic() - start) / {steps})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def scale(nodes: int, number: int) -> dict[str, Any]:
    """Many nodes, many rounds."""
    memory, begun, first = list[dict[str, float]](), time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for text, process in run(Path(folder), nodes, {**SCALE, "num-server-rounds": number, "run-name": "x"}):
            if said := re.match(r"round (\d+)/", text):
                first = first or time.monotonic() - begun
                if int(said[1]) in (2, number) or int(said[1]) % 10 == 0:  # it takes the machine a moment
                    memory.append({"round": int(said[1]), **used(process)})
        seconds = [row["seconds"] for row in rounds(Path(folder), "x")]
        failed = sum(row["clients_failed"] for row in rounds(Path(folder), "x"))
    each = statistics.median(seconds[1:]) / round(0.1 * nodes)
    print(
        f"{nodes} nodes: {first:.0f} s to the end of round 1, then {statistics.median(seconds[1:]):.1f} s a round, "
        f"{1e3 * each:.0f} ms a node; {failed} failed replies"
    )
    for one in memory:
        print(
            f"after round {one['round']:3.0f}: server {one['server']:.3f} GB, a training process {one['actor']:.3f} GB"
        )
    facts = {"nodes": nodes, "rounds": number, "start_seconds": first, "round_seconds": seconds, "failed": failed}
    return {**facts, "seconds_a_node": each, "memory_gb": memory}


def used(process: psutil.Process) -> dict[str, float]:
    """GB that the server and the largest training process have and share with nobody."""
    found = {"server": 0.0, "actor": 0.0}
    for child in process.children(recursive=True):
        try:
            line = " ".join(child.cmdline())
            kind = "server" if "flwr-simulation" in line else "actor" if "ClientAppActor" in line else ""
            if kind:
                found[kind] = max(found[kind], child.memory_full_info().uss / 1e9)
        except psutil.Error:
            continue
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "scale"))
    parser.add_argument("--nodes", type=int, help="default 10, or 1000")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--preset", default="tiny", help="model.preset of `overhead`: the smaller, the more it weighs")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    if options.what == "overhead":
        found = overhead(options.nodes or 10, options.steps, options.preset)
    else:
        found = scale(options.nodes or 1000, options.rounds)
    if options.out:
        facts = {**machine.facts(), **found}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
