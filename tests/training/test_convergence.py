"""Where rounds lead, and how fast, where it is known in closed form: docs/convergence.md.

Every node's images are Gaussian numbers and its denoiser is linear, so the expected loss is a quadratic function of the
weights, and so is every figure below. Training, coding and averaging are the package's own, with gradient descent.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feddm_flwr.aggregation.mean import StreamingMean
from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.config import RunConfig, parse
from feddm_flwr.evaluation.lipschitz import lipschitz
from feddm_flwr.exchange.channel import channel
from feddm_flwr.models import diffusion, parameters
from feddm_flwr.training import loop
from feddm_flwr.training.objectives import Drawn, HeldOut, Objective
from feddm_flwr.vector import Vector

TIMES = torch.arange(50, 850, 8)
STEPS, RATE = 5, 0.02
CPU = torch.device("cpu")


class Linear(nn.Module):
    """Predicts eps as slope_t x_t + offset_t."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.zeros(len(TIMES), 2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        slope, offset = self.line[torch.searchsorted(TIMES, t)].T.view(2, -1, 1, 1, 1)
        return SimpleNamespace(sample=slope * x + offset)


class Expected(Objective):
    """The denoising loss summed over the timesteps, of all images of a normal distribution and all noise."""

    def __init__(self, mean: float, deviation: float) -> None:
        process = diffusion.process(parse({}).diffusion)
        signal, self.noise = process.signal[TIMES], process.noise[TIMES]
        self.mean = signal * mean  # of x_t
        self.variance = (signal * deviation) ** 2 + self.noise**2

    def __len__(self) -> int:
        return 32 * STEPS

    def draw(self, index: Tensor, random: torch.Generator) -> Drawn:
        return (torch.ones(1),)

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        slope, offset = next(network.parameters()).T
        second = self.variance + self.mean**2
        errors = slope**2 * second + 2 * slope * offset * self.mean + offset**2 - 2 * slope * self.noise + 1
        return errors.sum() * drawn[0]

    def held_out(self, network: nn.Module, limit: int, name: str) -> HeldOut:
        return HeldOut()

    @property
    def curvature(self) -> np.ndarray[Any, Any]:
        """The Hessian of the loss."""
        found = np.zeros((2 * len(TIMES), 2 * len(TIMES)))
        for i, (m, v) in enumerate(zip(self.mean.numpy(), self.variance.numpy(), strict=True)):
            found[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = 2 * np.array([[v + m * m, m], [m, 1]])
        return found

    @property
    def optimum(self) -> np.ndarray[Any, Any]:
        """The weights of least loss."""
        slope = self.noise / self.variance
        return torch.stack([slope, -slope * self.mean], 1).double().flatten().numpy()


ALIKE = [Expected(0.5, 0.5), Expected(0.5, 0.5)]
UNLIKE = [Expected(-0.9, 0.3), Expected(0.6, 0.8)]
IMAGES = [1, 3]


def run_of(strategy: str, **keys: Any) -> RunConfig:
    t = {"optimizer": "sgd", "learning-rate": RATE, "lr-schedule": "constant", "warmup-steps": 0, "max-grad-norm": 1e9}
    own = {f"train.{key}": value for key, value in t.items()}
    return parse({**own, "train.moments": "reset", "train.local-steps": STEPS, "strategy": strategy, **keys})


def rounds(c: RunConfig, nodes: list[Expected], count: int) -> list[Vector]:
    """The global weights after each round, from 0: node by node as `node.train` and `server.strategy` have it."""
    network, size = Linear(), 2 * len(TIMES)
    up, down = (channel(name, c.codec, "0" * 32, size) for name in (c.codec.uplink, c.codec.downlink))
    optimizer = server_optimizer(c.server.optimizer, c.server.learning_rate, c.server.momentum)
    weights = np.zeros(size, np.float32)
    state, shadow = optimizer.init(weights), weights.copy()
    lost = [np.zeros(size, np.float32) for _ in nodes]
    found = []
    for number in range(1, count + 1):
        difference = weights - shadow if c.codec.shadow else weights
        sent = down.code(difference, "weights", number)[1]
        shadow = shadow + sent if c.codec.shadow else sent
        mean = StreamingMean(size, sum(IMAGES))
        for k, (objective, images) in enumerate(zip(nodes, IMAGES, strict=True)):
            parameters.load_vector(network, shadow)
            inherited = loop.Inherited(start=shadow + lost[k]) if c.codec.error_feedback else loop.Inherited()
            loop.train(network, objective, c, str(k), loop.Progress(number, 0), CPU, inherited)
            end = parameters.flat(network).numpy()
            if c.codec.target == "weights":
                update = up.code(end, "weights", number)[1] - shadow
            else:
                update = up.code(end - shadow, "delta", number)[1]
                lost[k] = end - shadow - update
            mean.add(update, images)
        base = weights if c.codec.target == "delta" else shadow
        weights, state = optimizer.update(base, mean.mean(), state)
        found.append(weights)
    return found


def predicted(nodes: list[Expected], mu: float = 0.0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Fixed point of plain averaging, and the matrix that a round multiplies the distance to it with."""
    identity, shares = np.eye(2 * len(TIMES)), np.array(IMAGES) / sum(IMAGES)
    linear, constant = np.zeros_like(identity), np.zeros(len(identity))
    for share, node in zip(shares, nodes, strict=True):
        pulled = node.curvature + mu * identity
        power = np.linalg.matrix_power(identity - RATE * pulled, STEPS)
        towards = np.linalg.solve(pulled, np.stack([node.curvature @ node.optimum, np.zeros(len(identity))], 1))[:, 0]
        pull = np.linalg.solve(pulled, mu * identity)  # the local loop's goal moves with the received weights
        linear += share * (power + (identity - power) @ pull)
        constant += share * (identity - power) @ towards
    return np.linalg.solve(identity - linear, constant), linear


def pace(linear: np.ndarray[Any, Any]) -> float:
    """By how much a round brings weights nearer to the fixed point, in the long run."""
    return float(np.abs(np.linalg.eigvals(linear)).max())


def optimum_of_all(nodes: list[Expected]) -> np.ndarray[Any, Any]:
    shares = np.array(IMAGES) / sum(IMAGES)
    curvature = sum(share * node.curvature for share, node in zip(shares, nodes, strict=True))
    goal = sum(share * node.curvature @ node.optimum for share, node in zip(shares, nodes, strict=True))
    return np.linalg.solve(curvature, goal)


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b))


CODED: list[tuple[dict[str, Any], float, float]] = [
    ({"strategy": "feddm-quant"}, 1.0, 0.3),  # weights: a step of less than half the grid's is rounded away
    ({"strategy": "feddm-quant", "codec.target": "delta"}, 2e-3, 5e-3),
    ({"strategy": "feddm-lean"}, 2e-3, 0.4),
]


@pytest.mark.parametrize(
    ("keys", "near"),
    [
        ({"strategy": "feddm-vanilla"}, 2e-3),
        ({"strategy": "feddm-prox", "train.mu": 0.5}, 2e-3),
        *((keys, near) for keys, near, _ in CODED),
    ],
    ids=str,
)
def test_equal_shares_lead_to_the_optimum(keys: dict[str, Any], near: float) -> None:
    """Differences get smaller, and with them what coding loses of them."""
    found = rounds(run_of(**keys), ALIKE, 200)
    assert distance(found[-1], ALIKE[0].optimum) < near


@pytest.mark.parametrize("mu", [0.0, 0.5, 5.0])
def test_unequal_shares_lead_to_the_predicted_point_as_predicted(mu: float) -> None:
    strategy = "feddm-prox" if mu else "feddm-vanilla"
    goal, linear = predicted(UNLIKE, mu)
    found = rounds(run_of(strategy, **{"train.mu": mu}), UNLIKE, 60)
    away = -goal
    for weights in found:
        away = linear @ away
        np.testing.assert_allclose(weights, goal + away, atol=1e-4)
    assert distance(goal, optimum_of_all(UNLIKE)) > 0.01  # which is not the optimum
    # What `contraction` in metrics.jsonl tells: the ratio of two steps.
    steps = [b - a for a, b in pairwise(found[30:40])]
    gauge = [np.linalg.norm(b) / np.linalg.norm(a) for a, b in pairwise(steps)]
    assert np.median(gauge) == pytest.approx(pace(linear), abs=0.02)


def test_a_proximal_term_makes_less_bias_and_slower_rounds() -> None:
    best = optimum_of_all(UNLIKE)
    points, maps = zip(*(predicted(UNLIKE, mu) for mu in (0.0, 0.2, 1.0, 3.0)), strict=True)
    biases, paces = [distance(point, best) for point in points], [*map(pace, maps)]
    assert biases == sorted(biases, reverse=True)
    assert paces == sorted(paces)


@pytest.mark.parametrize(("keys", "near"), [(keys, near) for keys, _, near in CODED], ids=str)
def test_unequal_shares_lead_coded_rounds_near_to_where_they_lead_exact_ones(keys: dict[str, Any], near: float) -> None:
    """The nodes' updates do not vanish there, only their mean, so what coding loses of them does not either."""
    found = rounds(run_of(**keys), UNLIKE, 200)
    goal, _ = predicted(UNLIKE)
    assert distance(found[-1], goal) < near


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_more_local_steps_make_more_bias(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_convergence.STEPS", steps)
    bias = distance(predicted(UNLIKE)[0], optimum_of_all(UNLIKE))
    assert (bias < 1e-9) == (steps == 1)  # one step each is one step on all images
    monkeypatch.setattr("test_convergence.STEPS", steps + 5)
    assert distance(predicted(UNLIKE)[0], optimum_of_all(UNLIKE)) > bias


def test_the_gauge_of_steepness_is_exact_where_the_denoiser_is_linear_and_a_lower_bound_elsewhere() -> None:
    network = Linear()
    parameters.load_vector(network, ALIKE[0].optimum.astype(np.float32))
    x, largest = torch.randn(len(TIMES), 1, 4, 4), float(network.line[:, 0].detach().max())
    assert lipschitz(network, x, TIMES, None) == pytest.approx(largest, rel=1e-3)

    class Bent(Linear):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.tanh(super().forward(x, t, labels).sample))

    bent = Bent()
    parameters.load_vector(bent, ALIKE[0].optimum.astype(np.float32))
    assert 0 < lipschitz(bent, x, TIMES, None) <= largest  # which is tanh's constant, 1, times the line's
