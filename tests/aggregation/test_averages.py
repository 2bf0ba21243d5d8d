"""Averages of the global weights: powers of time (EDM2, arXiv 2312.02696) and exponential ones."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest

from feddm_flwr.aggregation.averages import (
    USUAL_WIDTH,
    WIDTHS,
    Average,
    average,
    ema_factor,
    exponent,
    mix,
    restored,
)
from feddm_flwr.vector import Vector

STEPS = [16, 16, 3, 40, 16]
ROUNDS = [np.float32([number, number**2]) for number in range(1, 6)]


def after(kind: str, decay: float = 0.9, rounds: list[Vector] = ROUNDS) -> Average:
    found = average(kind, decay, np.float32([1e6, -1e6]))  # of the start nothing is to remain
    for weights, before, steps in zip(rounds, accumulate([0, *STEPS]), STEPS, strict=False):
        found.update(weights, before, steps)
    return found


def test_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent(0.1) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize(("name", "width"), [("ema.0.05", 0.05), ("ema.0.1", 0.1)])
def test_a_round_weighs_as_much_as_the_power_function_over_its_steps(name: str, width: float) -> None:
    ends = np.cumsum([0, *STEPS]) / sum(STEPS)
    shares = np.diff(ends ** (exponent(width) + 1))
    expected = (shares[:, None] * np.stack(ROUNDS)).sum(0)
    np.testing.assert_allclose(after("power").tensors()[name], expected, rtol=1e-6)


def test_the_width_decides_what_is_shipped() -> None:
    found = after("power")
    assert found.width == USUAL_WIDTH
    values = []
    for width in WIDTHS:
        found.width = width
        values.append(float(found.value(ROUNDS[-1])[0]))
    assert values == sorted(values, reverse=True)  # the wider, the older
    assert values[0] == ROUNDS[-1][0]


@pytest.mark.parametrize("kind", ["power", "exponential"])
def test_a_checkpoint_has_all_of_it(kind: str) -> None:
    whole, half = after(kind), after(kind, rounds=ROUNDS[:3])
    other = restored({name: tensor.copy() for name, tensor in half.tensors().items()}, 0.9)
    for weights, before, steps in zip(ROUNDS[3:], (35, 75), STEPS[3:], strict=True):
        other.update(weights, before, steps)
    assert other.value(ROUNDS[-1]).tobytes() == whole.value(ROUNDS[-1]).tobytes()


def test_an_exponential_average_forgets_the_start_of_a_short_run_and_keeps_the_decay_of_a_long_one() -> None:
    assert ema_factor(0.999, 0, 40) < 1e-30
    assert ema_factor(0.999, 10**6, 40) == pytest.approx(0.999**40)
    assert ema_factor(0.0, 10, 1) == 0.0
    # One round of H steps equals H rounds of one step each, once the decay is constant.
    assert ema_factor(0.9, 10**4, 7) == pytest.approx(ema_factor(0.9, 10**4, 1) ** 7)
    a, b = np.float32([1, 2]), np.float32([3, 6])
    mix(a, b, 0.5)
    assert a.tolist() == [2, 4]
    mix(a, b, 0.0)
    assert a.tolist() == b.tolist()
