"""What comes in during a round, and what a round came to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from statistics import pstdev
from typing import Any

from feddm_flwr.aggregation import Aggregate
from feddm_flwr.collection import Traffic
from feddm_flwr.config import NOISE_LEVELS
from feddm_flwr.exchange import Values
from feddm_flwr.node_report import NodeReport
from feddm_flwr.outliers import Lengths


@dataclass(frozen=True)
class Round:
    """What a round came to."""

    round: int
    weights: Values
    ema: Values
    train_loss: float
    eval_loss: float  # of the weights that the round started from; NaN where not evaluated
    eval_levels: list[float]  # the same by noise level, from the least noise to the most; empty where not evaluated
    eval_losses: dict[str, float]  # the same by node
    eval_spread: float  # how unequally the model serves the nodes: standard deviation of these; NaN where not known
    connected: int  # nodes that Flower had when it began
    clients_ok: int
    clients_failed: int
    failures: dict[str, int]
    bytes_up: int
    bytes_down: int
    bytes_full: int  # of bytes_down: whole shadows, for nodes that had lost theirs or were far behind
    bytes_up_fp32: int  # what the same messages would have been as plain float32
    bytes_down_fp32: int
    bytes_data_parallel: int  # each way, had the nodes exchanged float32 gradients after every step
    bytes_other: int  # both ways, of what is not training: models that the run builds upon, evaluations
    nodes: dict[str, dict[str, int]]  # by name: bytes up and down
    state_lost: int  # nodes whose residual was gone: the run is then not bit for bit that without
    coding_error: float  # norm of what the uplink lost over that of what was to be sent
    local_steps: int
    update_norm: float
    drift: float  # spread of the nodes' updates around their mean, over its norm; NaN where it is not known
    contraction: float  # norm of this round's step of the weights over that of the round before; NaN for the first
    seconds: float

    def figures(self) -> dict[str, Any]:
        """The round as a line of `metrics.jsonl`: everything but the vectors."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weights", "ema", "eval_losses")}
        if self.eval_losses:
            own["nodes"] = {
                name: of | ({"eval_loss": self.eval_losses[name]} if name in self.eval_losses else {})
                for name, of in self.nodes.items()
            }
        return own


@dataclass
class Tally:
    """The running sums of one attempt at a round."""

    means: dict[str, Aggregate]  # by part: weights are summed over the nodes that sent it
    part: dict[str, str]  # by node: what its reply is to cover
    traffic: Traffic = field(default_factory=Traffic)
    loss: list[tuple[str, float, int]] = field(default_factory=list)
    eval: list[tuple[str, float, int]] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    error: list[tuple[str, float, int]] = field(default_factory=list)
    levels: list[tuple[str, list[float], int]] = field(default_factory=list)
    squares: list[tuple[str, float, int]] = field(default_factory=list)  # of the norms of updates
    norms: dict[str, Lengths] = field(default_factory=dict)  # by part
    lost: int = 0

    @property
    def count(self) -> int:
        """Good replies."""
        return len(self.steps)

    def add(self, name: str, said: NodeReport, norm: float, images: int, held_out: int) -> None:
        """Count a good reply, whose update has that `norm`; `held_out` images were to be evaluated."""
        self.squares.append((name, norm**2, images))
        self.loss.append((name, said.train_loss, images))
        self.steps.append((name, said.steps, images))
        self.error.append((name, said.coding_error, images))
        self.lost += said.state_lost
        if held_out and said.eval_loss is not None:
            self.eval.append((name, said.eval_loss, held_out))
            if said.eval_levels:
                self.levels.append((name, said.eval_levels, held_out))

    def drift(self, norm: float) -> float:
        """How far the nodes' updates d_k are from their weighted mean d, over its `norm`:
        sum w_k |d_k - d|^2 = sum w_k |d_k|^2 - |d|^2, for whole updates."""
        return math.sqrt(max(0.0, weighted(self.squares) - norm**2)) / norm if norm else math.nan

    def spread(self) -> float:
        """Of the nodes' held-out losses; one of fewer images than noise levels is of some levels only."""
        losses = [loss for _, loss, images in self.eval if images >= NOISE_LEVELS]
        return pstdev(losses) if losses else math.nan


def weighted(values: Iterable[tuple[str, float, int]]) -> float:
    """The mean weighted by the third entry, summed in order of name so that its bits are fixed."""
    ordered = sorted(values)
    return sum(v * w for _, v, w in ordered) / sum(w for _, _, w in ordered)


def weighted_levels(values: Iterable[tuple[str, list[float], int]]) -> list[float]:
    """The same of lists of equal length, place by place."""
    ordered = [*values]
    return [
        weighted((name, levels[i], w) for name, levels, w in ordered) for i in range(NOISE_LEVELS if ordered else 0)
    ]
