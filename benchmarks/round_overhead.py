"""Seconds of a round on real nodes with next to nothing to train, beside an empty Flower app on the same nodes.

    python benchmarks/round_overhead.py --out benchmarks/results/round_overhead.json

A SuperLink and SuperNodes with TLS on loopback. Our job is one step of four 16x16 images with the `tiny`
model, once with the warm worker and once without; the empty app's client imports nothing and returns its message.
Medians without the first round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import machine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "deployment"))

from federation import Federation  # noqa: E402

EMPTY = {
    "pyproject.toml": """
[project]
name = "empty"
version = "1.0.0"
description = "nothing"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "feddm"
[tool.flwr.app.components]
serverapp = "empty:server"
clientapp = "empty:client"
[tool.flwr.app.config]
rounds = 3
nodes = 2
out = ""
""",
    "empty.py": """
import json, pathlib, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    seconds = []
    for _ in range(context.run_config["rounds"]):
        start = time.monotonic()
        nodes = [*grid.get_node_ids()]
        asked = [Message(RecordDict({"x": ConfigRecord({"x": 1})}), node, "train") for node in nodes]
        assert len([*grid.send_and_receive(asked)]) == len(nodes) == context.run_config["nodes"]
        seconds.append(time.monotonic() - start)
    pathlib.Path(context.run_config["out"]).write_text(json.dumps(seconds))
""",
}


def empty(federation: Federation, rounds: int) -> list[float]:
    """Seconds of each round of the empty app."""
    app, out = federation.folder / "empty", federation.folder / "empty.json"
    app.mkdir()
    for name, text in EMPTY.items():
        (app / name).write_text(text)
    federation.command(
        "flwr", "run", app, "site", "--stream", "-c", f'rounds={rounds} nodes={len(federation.sites)} out="{out}"'
    )
    seconds: list[float] = json.loads(out.read_text())
    return seconds


def ours(federation: Federation, rounds: int, name: str) -> list[float]:
    """Seconds of each round of ours."""
    job = {"train__local_steps": 1, "train__batch_size": 4, "min_replies": len(federation.sites)}
    code, said = federation.run(run_name=name, strategy="feddm-lean", num_server_rounds=rounds, **job)
    assert code == 0, said
    return [float(row["seconds"]) for row in federation.rows(name)]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=2, choices=(2, 3))
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        federation = Federation(Path(folder) / "federation", ("north", "south", "east")[: options.nodes])
        try:
            rows["empty Flower app"] = empty(federation, options.rounds)
            rows["feddm, warm worker"] = ours(federation, options.rounds, "warm")
            for site in federation.sites:
                federation.kill(site)
                federation.start_node(site, own="worker=false")
            rows["feddm, worker=false"] = ours(federation, options.rounds, "cold")
        finally:
            federation.close()
    for name, seconds in rows.items():
        print(f"{name:22s} {statistics.median(seconds[1:]):5.1f} s a round, the first {seconds[0]:5.1f} s")
    if options.out:
        result = {**machine.facts(), "nodes": options.nodes, "seconds": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
