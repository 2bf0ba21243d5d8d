"""What comes in during a round, and what a round came to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from feddm_flwr.aggregation import Aggregate
from feddm_flwr.collection import Traffic
from feddm_flwr.exchange import Values


@dataclass(frozen=True)
class Round:
    """What a round came to."""

    round: int
    weights: Values
    ema: Values
    train_loss: float
    eval_loss: float  # of the weights that the round started from; NaN where not evaluated
    latent_power: float  # mean square of an autoencoder's latents on held-out images; NaN where not evaluated
    clients_ok: int
    clients_failed: int
    failures: dict[str, int]
    bytes_up: int
    bytes_down: int
    bytes_full: int  # of bytes_down: whole shadows, for nodes that had lost theirs or were far behind
    bytes_up_fp32: int  # what the same messages would have been as plain float32
    bytes_down_fp32: int
    bytes_data_parallel: int  # each way, had the nodes exchanged float32 gradients after every step
    nodes: dict[str, dict[str, int]]  # by name: bytes up and down
    state_lost: int  # nodes whose residual was gone: the run is then not bit for bit that without
    coding_error: float  # norm of what the uplink lost over that of what was to be sent
    local_steps: int
    update_norm: float
    seconds: float

    def figures(self) -> dict[str, Any]:
        """The round as a line of `metrics.jsonl`: everything but the vectors."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weights", "ema")}
        if math.isfinite(self.latent_power):  # an autoencoder: its error is that of pixels in [-1, 1]
            own["psnr"] = round(10 * math.log10(4 / max(self.eval_loss, 1e-12)), 3)
        else:
            del own["latent_power"]
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
    power: list[tuple[str, float, int]] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=dict)  # by part
    lost: int = 0

    @property
    def count(self) -> int:
        """Good replies."""
        return len(self.steps)


def weighted(values: Iterable[tuple[str, float, int]]) -> float:
    """The mean weighted by the third entry, summed in order of name so that its bits are fixed."""
    ordered = sorted(values)
    return sum(v * w for _, v, w in ordered) / sum(w for _, _, w in ordered)
