"""Seconds of a round behind slow links: a SuperLink and SuperNodes with TLS, each node with a link of its own.

    python benchmarks/wan.py --out benchmarks/results/wan.json

Every node reaches the SuperLink by a proxy that lets so many bits through a second in each direction, and each of them
half a round trip late. The server's own link is as fast as this machine. The model has the 36 million parameters of the
paper's CIFAR-10 system; the nodes do one step of four 16x16 images, so that next to nothing but transfer and coding is
measured. Beside each figure is the time that the bytes alone take. (`feddm-secure` needs three nodes.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "deployment"))

from federation import Federation
from proxy import Proxy, end

_PIECE = 1 << 14  # bytes
_SITES = ("north", "south")
_JOB: dict[str, Any] = {
    "model__preset": "cifar10-32",
    "train__local_steps": 1,
    "train__batch_size": 4,
    "train__precision": "fp32",
    "eval__every": 0,
    "min_replies": len(_SITES),
    "round_timeout": 3600.0,
    "sample__count": 1,
    "sample__steps": 1,
}


class Link(Proxy):
    """A line of `mbit` million bits a second in each direction, with a round trip of `seconds`."""

    def __init__(self, target: int, mbit: float, seconds: float) -> None:
        self._rate, self._late = mbit * 1e6 / 8, seconds / 2
        self._free = [0.0, 0.0]  # when each direction has sent what it took, whichever connection it was of
        self._taking = [threading.Lock(), threading.Lock()]
        super().__init__(target)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        way = int(source.getsockname()[1] == self.port)
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._arrive, args=(under_way, source, sink), daemon=True).start()
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                with self._taking[way]:
                    self._free[way] = max(self._free[way], time.monotonic()) + len(piece) / self._rate
                    sent = self._free[way]
                time.sleep(max(0.0, sent - time.monotonic()))
                under_way.put((sent + self._late, piece))
        under_way.put((0.0, b""))

    @staticmethod
    def _arrive(under_way: queue.SimpleQueue[tuple[float, bytes]], source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (told := under_way.get())[1]:
                time.sleep(max(0.0, told[0] - time.monotonic()))
                sink.sendall(told[1])
        end(source)
        end(sink)


def measure(federation: Federation, strategy: str, mbit: float, rounds: int) -> dict[str, Any]:
    """Returns a strategy's rounds behind links of `mbit`, but for the first."""
    name = f"{strategy}-{mbit:g}"
    code, said = federation.run(limit=7200, run_name=name, strategy=strategy, num_server_rounds=rounds, **_JOB)
    assert code == 0, said
    rows = federation.rows(name)[1:]
    up, down = (statistics.median(row[key] for row in rows) / len(_SITES) for key in ("bytes_up", "bytes_down"))
    return {
        "strategy": strategy,
        "mbit": mbit,
        "seconds": [row["seconds"] for row in rows],
        "megabytes_up": up / 1e6,
        "megabytes_down": down / 1e6,
        "seconds_of_transfer": (up + down) * 8 / (mbit * 1e6),
    }


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, nargs="+", default=[10.0, 100.0])
    parser.add_argument("--round-trip", type=float, default=0.05, help="seconds")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["feddm-vanilla", "feddm-quant", "feddm-lean", "feddm-slow-link"],
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    facts = {**machine.facts(), "round_trip": options.round_trip, "nodes": len(_SITES)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        federation = Federation(Path(folder) / "federation", _SITES)
        try:
            for mbit in options.mbit:
                for site in _SITES:
                    federation.kill(site)
                    federation.start_node(site, port=Link(federation.port, mbit, options.round_trip).port)
                for strategy in options.strategies:
                    found.append(one := measure(federation, strategy, mbit, options.rounds))
                    if options.out:
                        options.out.write_text(json.dumps({**facts, "runs": found}, indent=1) + "\n")
                    print(
                        f"{strategy:16s} {mbit:5g} Mbit/s  {statistics.median(one['seconds']):7.1f} s a round, "
                        f"{one['seconds_of_transfer']:7.1f} s by the bytes",
                        flush=True,
                    )
        finally:
            federation.close()


if __name__ == "__main__":
    main()
