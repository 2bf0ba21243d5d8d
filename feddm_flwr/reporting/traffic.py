"""What a run's exchange cost, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feddm_flwr.reporting.records import RoundRecord, read_json, read_rounds, total_bytes


def megabytes(count: float) -> str:
    """Returns bytes in the unit that suits them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def traffic(run: Path) -> list[str]:
    """Returns what a run's exchange cost, in a few lines."""
    found = traffic_rows(read_rounds(run), read_json(run / "final.json", {}))
    return [f"{who}: {megabytes(sent)}, {note}" for who, sent, note in found if sent]


def traffic_rows(rows: Sequence[RoundRecord], final: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Returns (who, bytes, how that compares) for either direction."""
    result, total = [], total_bytes(rows)
    for who, way in (("sent by the nodes", "up"), ("sent by the server", "down")):
        sent = total[f"bytes_{way}"]
        note = f"{_times(total.get(f'bytes_{way}_fp32', 0), sent)} less than float32"
        if everything := total["bytes_data_parallel"]:
            note += f", {_times(everything, sent)} less than gradients after every step"
        if way == "down" and total["bytes_full"]:
            note += f"; {megabytes(total['bytes_full'])} of it whole models for nodes without them"
        result.append((who, sent, note))
    if other := total["bytes_other"] + final.get("bytes_other", 0):
        result.append(
            ("sent beside the training", other, "models it builds upon, feature network and sums, evaluation")
        )
    return result


def _times(more: int, less: int) -> str:
    ratio = more / max(less, 1)
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
