"""Server optimizers as `init` and `update`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from feddm_flwr.config import ConfigError
from feddm_flwr.config.plugins import is_plugin, load
from feddm_flwr.vector import Vector

State = dict[str, Vector]


@dataclass(frozen=True)
class ServerOptimizer:
    """A rule that turns the mean update into the next weights; its state is explicit.

    `init(weights) -> state`, `update(weights, delta, state) -> (weights, state)`.
    """

    init: Callable[[Vector], State]
    update: Callable[[Vector, Vector, State], tuple[Vector, State]]


def server_optimizer(name: str, learning_rate: float, momentum: float) -> ServerOptimizer:
    """Returns `averaging | nesterov | adam`, or an extension, with step size eta and momentum beta.

    Raises:
        ConfigError: the extension makes no server optimizer.
    """
    if not is_plugin(name):
        return {"averaging": averaging, "nesterov": nesterov, "adam": adam}[name](learning_rate, momentum)
    make: Any = load(key := "server.optimizer", name)
    try:
        made = make(learning_rate, momentum)
    except TypeError as error:
        raise ConfigError(f"{key} = {name!r}: must be a function of a step size and a momentum ({error})") from error
    if not isinstance(made, ServerOptimizer):
        raise ConfigError(f"{key} = {name!r}: must return a feddm_flwr.ServerOptimizer, not {type(made).__name__}")
    return made


def averaging(eta: float, beta: float = 0.0) -> ServerOptimizer:
    """Returns w <- w + eta * delta: federated averaging at eta = 1 (McMahan et al. 2017). Ignores beta."""

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        return w + np.float32(eta) * delta, state

    return ServerOptimizer(lambda w: {}, update)


def nesterov(eta: float, beta: float) -> ServerOptimizer:
    """Returns m <- beta m + delta; w <- w + eta (delta + beta m): the outer step of DiLoCo (Douillard et al.
    2023)."""

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        m: Vector = np.float32(beta) * state["m"] + delta
        step: Vector = delta + np.float32(beta) * m
        return w + np.float32(eta) * step, {"m": m}

    return ServerOptimizer(lambda w: {"m": np.zeros_like(w)}, update)


def adam(eta: float, beta: float, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """Returns FedAdam (Reddi et al. 2021, algorithm 2): no bias correction, v starts at tau^2."""

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        m: Vector = np.float32(beta) * state["m"] + np.float32(1 - beta) * delta
        v: Vector = np.float32(beta2) * state["v"] + np.float32(1 - beta2) * delta * delta
        step: Vector = (m / (np.sqrt(v) + np.float32(tau))).astype(np.float32, copy=False)
        return w + np.float32(eta) * step, {"m": m, "v": v}

    return ServerOptimizer(lambda w: {"m": np.zeros_like(w), "v": np.full_like(w, tau * tau)}, update)
