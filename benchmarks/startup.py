"""Seconds from `feddm run` to its stages: the run accepted, the nodes introduced, the first reply, the end.

    python benchmarks/startup.py --out benchmarks/results/startup.json
    python benchmarks/startup.py --before /elsewhere/.venv/bin/feddm      # in turns with another version

Four simulated nodes train one step on the embedded digits, each time in an empty folder. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

KEYS = "num-server-rounds=1 train.local-steps=1 sample.count=1 sample.steps=1"
#: What the log says at each stage.
STAGES = {"accepted": "Successfully started run", "introduced": "feddm: node ", "first reply": " done=1 "}


def measure(feddm: Path) -> dict[str, float]:
    """One run's stages, in seconds from its start."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        process = subprocess.Popen(
            [feddm, "run", "-v", "-c", KEYS],
            cwd=folder,
            env={**os.environ, "XDG_STATE_HOME": folder, "FLWR_HOME": f"{folder}/flower"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout
        found: dict[str, float] = {}
        for line in process.stdout:
            for stage, said in STAGES.items():
                if said in line:
                    found.setdefault(stage, round(time.monotonic() - start, 2))
        if process.wait():
            sys.exit(f"{feddm} run failed")
        return {**found, "end": round(time.monotonic() - start, 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the feddm command of another version")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    commands = {"now": Path(sys.executable).parent / "feddm"} | ({"before": options.before} if options.before else {})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.repeat):
        for name, feddm in commands.items():
            runs[name].append(measure(feddm))
            print(name, runs[name][-1], flush=True)
    medians = {name: {k: statistics.median(r[k] for r in of) for k in of[0]} for name, of in runs.items()}
    for name, of in medians.items():
        print("median", name, of)
    if options.out:
        text = json.dumps({**machine.facts(), "seconds": runs, "medians": medians}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
