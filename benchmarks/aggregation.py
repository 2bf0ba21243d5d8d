"""Memory and time of the server as nodes are added: FedDM's streaming mean beside Flower's FedAvg.

    python benchmarks/aggregation.py --out benchmarks/results/aggregation.json

Simulated nodes (Flower's, two processes) answer at once with a random update of a model of 36 million
parameters: 8-bit for FedDM, which also keeps an average of the weights and writes a checkpoint every round,
float32 for FedAvg. Each case is a process of its own; the memory is the peak of the one with the ServerApp, in all
and without what it shares with Ray's processes (its object store, mapped into each of them). The pause is from the
last reply of a round to the first message of the next one. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import machine
import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from feddm_flwr.config import parse
from feddm_flwr.exchange.channel import channel
from feddm_flwr.exchange.partial import ALL, Split, Subset
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage import checkpoint
from feddm_flwr.vector import Layout

CONFIG = parse({"strategy": "feddm-quant", "codec.target": "delta", "codec.downlink": "int8", "wait-timeout": 120})


def update(size: int, node: int) -> np.ndarray:
    """What a node learnt: small, and different for each."""
    return np.random.default_rng(node).standard_normal(size, np.float32) * np.float32(1e-3)


class Pause:
    """Measures the time between the last reply of a round and the first message of the next."""

    def __init__(self, grid: Grid) -> None:
        self.seconds: list[float] = []
        self._last = self._ended = 0.0
        push, pull = grid.push_messages, grid.pull_messages

        def timed_push(messages: Iterable[Message]) -> Iterable[str]:
            if self._ended:
                self.seconds.append(time.monotonic() - self._ended)
                self._ended = 0.0
            return push(messages)

        def timed_pull(names: Iterable[str]) -> Iterable[Message]:
            if replies := [*pull(names)]:
                self._last = time.monotonic()
            return replies

        grid.push_messages, grid.pull_messages = timed_push, timed_pull  # type: ignore[method-assign]

    def begin(self) -> None:
        """The replies of a round are in."""
        self._ended = self._last


def feddm(size: int, rounds: int, seconds: list[float], pauses: list[float]) -> tuple[ServerApp, ClientApp]:
    """Our server and nodes that do not train."""
    layout = Layout(("weights",), ((size,),))
    whole = Subset(layout, (slice(0, size),))
    client, server = ClientApp(), ServerApp()

    @client.query()
    def introduce(message: Message, context: Context) -> Message:
        said = {"name": f"node-{context.node_config['partition-id']}", "problem": "", "images": 10, "held-out": 0}
        return Message(RecordDict({"report": ConfigRecord({**said, "class-counts": "{}"})}), reply_to=message)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        node, number = int(context.node_config["partition-id"]), int(message.content.config_records["task"]["round"])
        up = channel(CONFIG.codec.uplink, CONFIG.codec, layout.fingerprint, size)
        frame = up.encode(update(size, node), "delta", number)
        said = {"name": f"node-{node}", "round": number, "images": 10, "steps": 1, "train-loss": 1.0, "eval-loss": 1.0}
        report = ConfigRecord({**said, "coding-error": 0.0, "state-lost": False})
        arrays = ArrayRecord({"frame": Array("uint8", (len(frame),), "feddm.frame", frame)})
        return Message(RecordDict({"report": report, "weights": arrays}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        config = replace(CONFIG, num_server_rounds=rounds)
        parts = Split(whole, Subset(Layout((), ()), ()), {ALL: whole})
        with tempfile.TemporaryDirectory() as folder:
            run, pause = FedDM(config, update(size, -1 % 2**32), parts, "0" * 32), Pause(grid)
            with checkpoint.Writer(Path(folder) / "checkpoints", keep=1) as writer:

                def before_step() -> None:
                    writer.wait()
                    pause.begin()

                start = time.monotonic()
                for _ in run.run(grid, before_step):
                    writer.begin(run.checkpoint())
                    seconds.append(time.monotonic() - start)
                    start = time.monotonic()
            pauses.extend(pause.seconds)

    return server, client


def fedavg(size: int, rounds: int, seconds: list[float], pauses: list[float]) -> tuple[ServerApp, ClientApp]:
    """Flower's own strategy, float32."""
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = ArrayRecord([update(size, int(context.node_config["partition-id"]))])
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        ended = [time.monotonic()]
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=len(list(grid.get_node_ids())))
        weights = ArrayRecord([update(size, -1 % 2**32)])
        strategy.start(grid, weights, num_rounds=rounds, evaluate_fn=lambda *_: ended.append(time.monotonic()))
        seconds.extend(after - before for before, after in pairwise(ended[1:]))  # it is called before round 1 as well

    return server, client


def watch(peaks: dict[str, int]) -> None:
    """Keep the peaks of this process's memory, in bytes."""
    while True:
        memory = psutil.Process().memory_info()
        peaks["all"] = max(peaks["all"], memory.rss)
        peaks["own"] = max(peaks["own"], memory.rss - memory.shared)
        time.sleep(0.02)


def case(kind: str, nodes: int, size: int, rounds: int) -> None:
    """One measurement, in a process of its own: a line of JSON at the end of standard output."""
    seconds: list[float] = []
    pauses: list[float] = []
    peaks = {"all": 0, "own": 0}
    Thread(target=watch, args=(peaks,), daemon=True).start()
    server, client = {"feddm": feddm, "fedavg": fedavg}[kind](size, rounds, seconds, pauses)
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, nodes, backend_config=backend)
    assert len(seconds) == rounds, "the run failed"
    memory = {"peak_gb": round(peaks["all"] / 1e9, 3), "own_gb": round(peaks["own"] / 1e9, 3)}
    row = {"server": kind, "nodes": nodes, **memory, "seconds": round(median(seconds), 1)}
    if pauses:
        row["pause"] = round(median(pauses), 2)
    print(json.dumps(row), flush=True)
    os._exit(0)  # Ray's processes end with this one


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="feddm:4,feddm:16,feddm:64,fedavg:4,fedavg:16", help="server:nodes, …")
    parser.add_argument("--millions", type=float, default=36, help="parameters, in millions (default 36)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = round(options.millions * 1e6)
    if options.case:
        kind, nodes = options.case.split(":")
        case(kind, int(nodes), size, options.rounds)
    rows: list[dict[str, Any]] = []
    for one in options.cases.split(","):
        line = [sys.executable, __file__, "--case", one, "--millions", options.millions, "--rounds", options.rounds]
        done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
        if done.returncode or not done.stdout.strip():
            sys.exit(f"{one} failed:\n{done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{rows[-1]['server']:8s} {rows[-1]['nodes']:4d} nodes: {rows[-1]['peak_gb']:6.2f} GB at most,", end=" ")
        print(f"{rows[-1]['own_gb']:6.2f} GB its own,", end=" ")
        print(f"{rows[-1]['seconds']:6.1f} s a round, pause {rows[-1].get('pause', '–')} s", flush=True)
    if options.out:
        result = {**machine.facts(), "values": size}
        options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
