"""What private steps cost, against closed forms, an integral, and a published figure."""

from __future__ import annotations

import math

import pytest
from scipy.integrate import quad
from scipy.stats import norm

from feddm_flwr.privacy.accounting import Steps, epsilon, noise_for

DELTA = 1e-5


def test_whole_batches_cost_what_one_gaussian_costs() -> None:
    """T steps of noise s are one of s / sqrt(T), whose delta is known (Balle and Wang 2018, theorem 8)."""
    for noise, count in ((3.0, 1), (10.0, 100), (1.0, 4)):
        found, single = epsilon([Steps(1.0, noise, count)], DELTA), noise / math.sqrt(count)
        delta = norm.cdf(0.5 / single - found * single) - math.exp(found) * norm.cdf(-0.5 / single - found * single)
        assert delta == pytest.approx(DELTA, rel=0.02)
        assert delta <= DELTA * (1 + 1e-6)


def test_a_step_of_a_random_batch_costs_what_the_integral_says() -> None:
    noise, chance = 0.8, 0.3
    found = epsilon([Steps(chance, noise, 1)], DELTA)

    def excess(x: float) -> float:
        without = norm.pdf(x, 0, noise)
        return max(0.0, (1 - chance) * without + chance * norm.pdf(x, 1, noise) - math.exp(found) * without)

    delta, _ = quad(excess, -20, 20, points=[0, 1, 2, 3], limit=500)
    assert delta == pytest.approx(DELTA, rel=0.02)


def test_sixty_epochs_of_mnist_cost_no_more_than_was_published() -> None:
    """Batches of 256 of 60,000, noise 1.1: TensorFlow Privacy's tutorial says 2.92 by Renyi accounting, which is an
    upper bound; Opacus, by the distribution of the loss, 2.4."""
    found = epsilon([Steps(256 / 60_000, 1.1, 60 * 60_000 // 256)], DELTA)
    assert 2.3 < found < 2.45


def test_costs_add_up_in_any_order_and_of_equal_steps_in_one() -> None:
    some, others = Steps(0.01, 0.9, 30), Steps(0.02, 1.2, 10)
    together = epsilon([some, others], DELTA)
    assert epsilon([others, some], DELTA) == together
    assert epsilon([Steps(0.01, 0.9, 10), others, Steps(0.01, 0.9, 20)], DELTA) == together
    assert max(epsilon([some], DELTA), epsilon([others], DELTA)) < together
    assert epsilon([], DELTA) == 0


@pytest.mark.parametrize(("limit", "chance", "count"), [(0.1, 1e-3, 100_000), (1.0, 1e-3, 100_000), (0.01, 1e-3, 1000)])
def test_noise_is_enough_where_losses_are_tiny(limit: float, chance: float, count: int) -> None:
    noise = noise_for(limit, DELTA, chance, count)
    assert limit * 0.9 < epsilon([Steps(chance, noise, count)], DELTA) <= limit


def test_what_is_no_privacy_is_said_at_once() -> None:
    assert epsilon([Steps(0.5, 0.01, 10_000)], DELTA) == math.inf


@pytest.mark.parametrize("limit", [0.5, 3.0, 10.0])
def test_the_noise_that_is_found_is_enough_and_hardly_more(limit: float) -> None:
    noise = noise_for(limit, DELTA, 0.02, 100)
    assert limit * 0.98 < epsilon([Steps(0.02, noise, 100)], DELTA) <= limit
    assert epsilon([Steps(0.02, noise - 0.001, 100)], DELTA) > limit
