"""What finding canaries proves: never more than is true, and something where a training hides nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from feddm_flwr.privacy.audit import epsilon_at_least, guesses


def test_as_many_right_guesses_as_by_chance_prove_nothing() -> None:
    assert epsilon_at_least(100, 50, 25, 0.0) == 0
    assert epsilon_at_least(100, 50, 30, 1e-5) == 0
    assert epsilon_at_least(100, 50, 0, 0.0) == 0


def test_all_right_prove_what_a_coin_would_have_to_be() -> None:
    """Of pure epsilon: 20 right in a row at 5 % are a coin that is right in 0.05^(1/20) of the cases."""
    each = 0.05 ** (1 / 20)
    assert epsilon_at_least(40, 20, 20, 0.0) == pytest.approx(math.log(each / (1 - each)), abs=2e-3)
    assert epsilon_at_least(40, 20, 20, 1e-5) < epsilon_at_least(40, 20, 20, 0.0)
    assert epsilon_at_least(40, 20, 20, 0.01) < epsilon_at_least(40, 20, 20, 1e-5)
    assert epsilon_at_least(1000, 500, 500, 0.0) > epsilon_at_least(40, 20, 20, 0.0)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomized_response_is_bounded_from_below_by_what_it_is(epsilon: float) -> None:
    """The most that epsilon allows: each coin is told truly with e^epsilon to 1. 5 % of the audits may say more,
    and with many candidates they come near."""
    random = np.random.default_rng(0)
    each = 1 / (1 + math.exp(-epsilon))
    found = [epsilon_at_least(2000, 1000, int(random.binomial(1000, each)), 0.0) for _ in range(200)]
    assert sum(one > epsilon for one in found) <= 16  # 10 on average
    assert np.median(found) > 0.75 * epsilon


def test_guesses_are_of_the_least_and_the_largest_losses() -> None:
    included = np.array([True, False, True, True, False, False, False, True])
    losses = np.array([0.1, 0.9, 0.2, 0.5, 0.8, 0.4, 0.6, 0.3])
    assert guesses(losses, included) == (4, 4)
    assert guesses(-losses, included) == (4, 0)
