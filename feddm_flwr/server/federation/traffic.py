"""Bytes that went over the wire."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from flwr.app import RecordDict

from feddm_flwr.protocol.tasks import SHADOW, WEIGHTS_RECORD, is_asset


@dataclass
class Traffic:
    """What went over the wire, in bytes of frames, and what came back that was of no use."""

    up: Counter[str] = field(default_factory=Counter)  # by node
    down: Counter[str] = field(default_factory=Counter)
    other: int = 0  # both ways, what is not of the training: assets, evaluations
    full: int = 0  # of `down`: whole shadows, for nodes that had lost theirs or were far behind
    float32_up: int = 0  # what the same messages would have been as plain float32
    float32_down: int = 0  # a second one with the whole shadow is not counted
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: Traffic) -> None:
        """Counts another attempt's as well: what was sent was paid for."""
        self.up += other.up
        self.down += other.down
        self.other += other.other
        self.full += other.full
        self.float32_up += other.float32_up
        self.float32_down += other.float32_down
        self.failures += other.failures


def most_bytes(values: int) -> int:
    """Returns what a coded update of so many values may have: a little more than float32 takes."""
    return 5 * values + 100_000


def count(traffic: Traffic, name: str, sent: RecordDict) -> None:
    """Counts what is sent to the node of that name."""
    arrays = sent.array_records[WEIGHTS_RECORD]
    assets = sum(len(array.data) for key, array in arrays.items() if is_asset(key))
    size = sum(len(array.data) for array in arrays.values()) - assets
    traffic.down[name] += size
    traffic.other += assets
    traffic.full += len(arrays[SHADOW].data) if SHADOW in arrays else 0
