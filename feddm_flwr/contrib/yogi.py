"""A server optimizer: FedYogi."""

from __future__ import annotations

import numpy as np

from feddm_flwr.aggregation.server_optimizers import ServerOptimizer, State
from feddm_flwr.vector import Vector


def yogi(eta: float, beta: float) -> ServerOptimizer:
    """Returns FedYogi (Reddi et al. 2021, algorithm 2) with step size eta and beta_1 = beta."""
    beta2, tau = np.float32(0.99), np.float32(1e-3)

    def update(w: Vector, delta: Vector, state: State) -> tuple[Vector, State]:
        m: Vector = np.float32(beta) * state["m"] + np.float32(1 - beta) * delta
        square: Vector = delta * delta
        v: Vector = state["v"] - np.float32(1 - beta2) * square * np.sign(state["v"] - square)
        step: Vector = (m / (np.sqrt(v) + tau)).astype(np.float32, copy=False)
        return w + np.float32(eta) * step, {"m": m, "v": v}

    return ServerOptimizer(lambda w: {"m": np.zeros_like(w), "v": np.full_like(w, tau * tau)}, update)
