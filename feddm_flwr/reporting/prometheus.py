"""`metrics.prom`: how far a run is, for the textfile collector of Prometheus' node_exporter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from feddm_flwr.reporting.records import RoundRecord, total_bytes
from feddm_flwr.storage.atomic import whole_file


def write(run: Path, rounds: Sequence[RoundRecord], asked: int, *, running: bool) -> None:
    """Writes the file in a run's folder, of its rounds so far and of as many as are asked for."""
    name = run.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for metric, kind, text, value in _metrics(rounds, asked, running=running):
        if value is not None and math.isfinite(value):
            lines += [f"# HELP feddm_{metric} {text}", f"# TYPE feddm_{metric} {kind}"]
            lines.append(f'feddm_{metric}{{run="{name}"}} {value!r}')
    with whole_file(run / "metrics.prom") as file:
        file.write(("\n".join(lines) + "\n").encode())


def _metrics(
    rounds: Sequence[RoundRecord], asked: int, *, running: bool
) -> Iterator[tuple[str, str, str, float | None]]:
    def last(figure: str) -> float | None:
        return next((value for r in reversed(rounds) if (value := r.figure(figure)) is not None), None)

    total = total_bytes(rounds)
    yield "running", "gauge", "Whether the run goes on.", int(running)
    yield "rounds", "gauge", "Rounds that are done.", rounds[-1].round if rounds else 0
    yield "rounds_asked", "gauge", "Rounds of the whole run.", asked
    yield "nodes_connected", "gauge", "Nodes that were connected in the last round.", last("connected")
    yield "replies_ok_total", "counter", "Replies that entered a round.", sum(r.clients_ok for r in rounds)
    yield "replies_failed_total", "counter", "Replies that did not.", sum(r.clients_failed for r in rounds)
    yield "bytes_up_total", "counter", "Coded bytes from the nodes.", total["bytes_up"]
    yield "bytes_down_total", "counter", "Coded bytes to the nodes.", total["bytes_down"]
    yield "round_seconds", "gauge", "Seconds that the last round took.", last("seconds")
    yield "train_loss", "gauge", "Training loss of the last round.", last("train_loss")
    yield "eval_loss", "gauge", "Held-out loss that was found last.", last("eval_loss")
    yield "fid", "gauge", "FID that was found last.", last("fid")
    yield "epsilon", "gauge", "The most that was spent of privacy in this run.", last("epsilon")
