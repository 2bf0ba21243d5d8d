"""The server's arithmetic: a streaming mean that does not depend on the order of arrival, server
optimizers as `init` and `update`, and the moving average of the global weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

#: Binary places of the fixed-point sum: 2^-32 is far below float32's resolution of weights.
FRACTION_BITS = 32
_LIMIT = 2.0**62
_CHUNK = 1 << 15  # temporaries that stay in the cache: twice as fast as larger ones
#: Added to a float64 below 2^51 it leaves the nearest integer in the low bits: rounding and conversion in one addition.
_ROUNDING = np.float64(1.5 * 2.0**52)


class StreamingMean:
    """The weighted mean of vectors that are added one by one and can be freed at once.

    Each vector enters as `round(weight * v * 2^S)` in 64-bit integers, whose addition is associative:
    the mean has the same bits whatever the order. Memory: 8 bytes per value, however many vectors.
    """

    def __init__(self, size: int, total_weight: int) -> None:
        """`total_weight` is what all vectors that may come weigh together."""
        self._total = total_weight
        self._sum: NDArray[np.int64] = np.zeros(size, np.int64)
        self._offset = np.zeros((), np.int64)  # what the sums have too much, modulo 2^64 as they are
        self.weight = 0
        self._count = 0

    @property
    def count(self) -> int:
        """Vectors added."""
        return self._count

    def add(self, vector: Vector, weight: int, frame: bytes = b"", scale: float = 1.0) -> None:
        """Add a finite vector, weighted by a number of images; other rules need its `frame` and `scale`.

        Raises:
            ValueError: the values are so large that a sum of such vectors could overflow; nothing
                was added then. This too does not depend on the order.
        """
        assert 1 <= weight <= self._total - self.weight, (weight, self.weight, self._total)
        largest = float(max(vector.max(initial=0), -vector.min(initial=0)))
        if not largest * self._total * 2.0**FRACTION_BITS < _LIMIT:
            raise ValueError(f"the update has values up to {largest:.3g}: too large to add up exactly")
        factor = weight * 2.0**FRACTION_BITS
        small = largest * factor < 2.0**51
        scaled = np.empty(_CHUNK)
        for start in range(0, len(vector), _CHUNK):
            values, total = vector[start : start + _CHUNK], self._sum[start : start + _CHUNK]
            part = scaled[: len(values)]
            part[:] = values
            part *= factor
            if small:
                part += _ROUNDING
                total += part.view(np.int64)
            else:
                total += np.rint(part).astype(np.int64)
        if small:
            self._offset += _ROUNDING.view(np.int64)
        self.weight += weight
        self._count += 1

    def mean(self) -> Vector:
        """The mean as float32; zeros where nothing was added."""
        divisor = max(self.weight, 1) * 2.0**FRACTION_BITS
        result = np.empty(len(self._sum), np.float32)
        for start in range(0, len(result), _CHUNK):
            result[start : start + _CHUNK] = (self._sum[start : start + _CHUNK] - self._offset) / divisor
        return result


class Aggregate(Protocol):
    """A rule by which the updates of a round become one; `RobustMean` has others."""

    @property
    def count(self) -> int:
        """Vectors added."""

    def add(self, vector: Vector, weight: int, frame: bytes, scale: float) -> None:
        """Add a node's update, and the frame that holds it before it was scaled."""

    def mean(self) -> Vector:
        """The result."""


State = dict[str, Vector]


@dataclass(frozen=True)
class ServerOptimizer:
    """A rule that turns the mean update into the next weights; its state is explicit.

    `init(weights) -> state`, `update(weights, delta, state) -> (weights, state)`.
    """

    init: Callable[[Vector], State]
    update: Callable[[Vector, Vector, State], tuple[Vector, State]]


def server_optimizer(name: str, learning_rate: float, momentum: float) -> ServerOptimizer:
    """`averaging | nesterov | adam`, with step size eta and momentum beta."""
    return {"averaging": averaging, "nesterov": nesterov, "adam": adam}[name](learning_rate, momentum)


def averaging(eta: float, beta: float = 0.0) -> ServerOptimizer:
    """w <- w + eta * delta: federated averaging at eta = 1 (McMahan et al. 2017). Ignores beta."""

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        return w + np.float32(eta) * delta, state

    return ServerOptimizer(lambda w: {}, update)


def nesterov(eta: float, beta: float) -> ServerOptimizer:
    """m <- beta m + delta; w <- w + eta (delta + beta m): the outer step of DiLoCo
    (Douillard et al. 2023)."""

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        m: Vector = np.float32(beta) * state["m"] + delta
        step: Vector = delta + np.float32(beta) * m
        return w + np.float32(eta) * step, {"m": m}

    return ServerOptimizer(lambda w: {"m": np.zeros_like(w)}, update)


def adam(eta: float, beta: float, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdam (Reddi et al. 2021, algorithm 2): no bias correction, v starts at tau^2."""

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        m: Vector = np.float32(beta) * state["m"] + np.float32(1 - beta) * delta
        v: Vector = np.float32(beta2) * state["v"] + np.float32(1 - beta2) * delta * delta
        step: Vector = (m / (np.sqrt(v) + np.float32(tau))).astype(np.float32, copy=False)
        return w + np.float32(eta) * step, {"m": m, "v": v}

    return ServerOptimizer(lambda w: {"m": np.zeros_like(w), "v": np.full_like(w, tau * tau)}, update)


def ema_factor(decay: float, steps_before: int, steps: int) -> float:
    """What remains of the average in a round of `steps` local steps after `steps_before` others:
    min(decay, (1 + s) / (10 + s))^H. A decay per round would ship the initial noise of a short run."""
    return float(min(decay, (1 + steps_before) / (10 + steps_before)) ** steps)


def ema_update(ema: Vector, weights: Vector, factor: float) -> Vector:
    """factor * ema + (1 - factor) * weights."""
    result: Vector = np.float32(factor) * ema
    for start in range(0, len(result), _CHUNK):
        result[start : start + _CHUNK] += np.float32(1 - factor) * weights[start : start + _CHUNK]
    return result


def euclidean_norm(vector: Vector, origin: Vector | None = None) -> float:
    """The Euclidean norm, or distance from `origin`, summed in float64 piece by piece: finite if all values are."""
    pieces = (slice(start, start + _CHUNK) for start in range(0, len(vector), _CHUNK))
    parts = (vector[piece] if origin is None else vector[piece] - origin[piece] for piece in pieces)
    return math.sqrt(math.fsum(float(np.square(part, dtype=np.float64).sum()) for part in parts))
