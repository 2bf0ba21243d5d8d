"""The mean is exact and does not depend on order; the server steps are what their papers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feddm_flwr.aggregation.mean import StreamingMean
from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.vector import Vector

RANDOM = np.random.default_rng(0)


def updates(count: int, size: int = 1000) -> list[tuple[Vector, int]]:
    return [
        ((RANDOM.standard_normal(size) * 10.0 ** RANDOM.integers(-6, 1)).astype(np.float32), int(w))
        for w in RANDOM.integers(1, 60_000, count)
    ]


def mean_of(pairs: list[tuple[Vector, int]]) -> Vector:
    mean = StreamingMean(len(pairs[0][0]), sum(w for _, w in pairs))
    for vector, weight in pairs:
        mean.add(vector, weight)
    return mean.mean()


@given(st.permutations(list(range(6))))
def test_the_order_of_arrival_does_not_matter(order: list[int]) -> None:
    assert mean_of([PAIRS[i] for i in order]).tobytes() == mean_of(PAIRS).tobytes()


PAIRS = updates(6)


def test_the_mean_is_that_of_float64_rounded_once() -> None:
    exact = np.average([v.astype(np.float64) for v, _ in PAIRS], axis=0, weights=[w for _, w in PAIRS])
    np.testing.assert_allclose(mean_of(PAIRS), exact, rtol=1e-6, atol=1e-12)


def test_the_mean_of_one_is_itself() -> None:
    vector, weight = updates(1)[0]
    np.testing.assert_allclose(mean_of([(vector, weight)]), vector, rtol=0, atol=2**-32)


def test_what_could_overflow_is_refused_whenever_it_comes_and_nothing_is_added() -> None:
    good, too_large = np.array([1, 2], np.float32), [[2e7, 0], [1e30, 0], [np.nan, 0], [np.inf, 0]]
    for first in (True, False):
        mean = StreamingMean(2, total_weight=100)
        if first:
            mean.add(good, 10)
        for vector in too_large:
            with pytest.raises(ValueError, match="too large"):
                mean.add(np.array(vector, np.float32), 10)
        if not first:
            mean.add(good, 10)
        assert (mean.count, mean.weight, mean.mean().tolist()) == (1, 10, [1.0, 2.0])


def test_the_largest_values_that_are_taken_add_up_exactly() -> None:
    mean = StreamingMean(1, total_weight=100)
    for sign in (1, 1, -1):
        mean.add(np.array([sign * 1.07e7], np.float32), 33)
    assert mean.mean()[0] == pytest.approx(1.07e7 / 3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])  # below and above what is rounded by one addition
def test_each_vector_enters_rounded_to_the_nearest_fixed_point_number(scale: float) -> None:
    vectors = [(scale * RANDOM.standard_normal(70_001)).astype(np.float32) for _ in range(9)]
    mean = StreamingMean(70_001, total_weight=9 * 1000)
    for vector in vectors:
        mean.add(vector, 1000)
    exact = sum(np.rint(v.astype(np.float64) * 1000 * 2.0**32).astype(np.int64) for v in vectors)
    assert mean.mean().tobytes() == (exact / (9000 * 2.0**32)).astype(np.float32).tobytes()


def steps(name: str, eta: float, beta: float, deltas: list[Vector]) -> Vector:
    w = np.zeros_like(deltas[0])
    optimizer = server_optimizer(name, eta, beta)
    state = optimizer.init(w)
    for delta in deltas:
        w, state = optimizer.update(w, delta, state)
        assert w.dtype == np.float32
    return w


DELTAS = [v for v, _ in updates(5)]


def test_averaging_at_1_takes_the_mean_of_the_nodes_weights() -> None:
    w, *of_nodes = [v for v, _ in updates(4)]
    mean = mean_of([(v - w, 1) for v in of_nodes])
    stepped, _ = server_optimizer("averaging", 1.0, 0.0).update(w, mean, {})
    np.testing.assert_allclose(stepped, np.mean(of_nodes, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.6, 0.9])
def test_nesterov_is_torch_sgd_on_the_negative_update(beta: float) -> None:
    w = torch.zeros(len(DELTAS[0]), requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.7, momentum=beta, nesterov=beta > 0)
    for delta in DELTAS:
        w.grad = -torch.from_numpy(delta)
        sgd.step()
    np.testing.assert_allclose(steps("nesterov", 0.7, beta, DELTAS), w.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_adam_moves_every_weight_alike_and_stands_still_without_updates() -> None:
    """Steps do not depend on the scale of an update, once it is far above tau."""
    large, small = (steps("adam", 0.1, 0.9, [np.float32([scale, -scale, 0])] * 50) for scale in (10.0, 1.0))
    np.testing.assert_allclose(large, small, rtol=0.01)
    assert large[0] == -large[1] > 1
    assert large[2] == 0
