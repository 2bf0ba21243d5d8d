"""An audit that can fail: what it proves to find images in a model that a node had made up.

Of a number of candidates each is put among the node's images by a coin of its own. Whoever tells from the model, for
some of them, on which side each coin fell, more often than a private training allows, has bounded its epsilon from
below (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846: one training is enough).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_GUESSED = 4  # a candidate of so many is guessed to be among the images, and one not to be
CONFIDENCE = 0.95


def guesses(losses: NDArray[np.float64], included: NDArray[np.bool_]) -> tuple[int, int]:
    """Returns how many guesses are made, and how many are right: those of least loss are taken to be in, those of most
    to be out."""
    order, each = np.argsort(losses, kind="stable"), len(losses) // _GUESSED
    right = included[order[:each]].sum() + (~included[order[len(order) - each :]]).sum()
    return 2 * each, int(right)


def epsilon_at_least(count: int, made: int, right: int, delta: float) -> float:
    """Returns an epsilon below which no (epsilon, delta)-private training has, with `CONFIDENCE`: that of so many
    candidates, guesses and right guesses (theorem 5.2 of the paper)."""
    least, most = 0.0, 20.0
    if _chance(count, made, right, least, delta) > 1 - CONFIDENCE:
        return 0.0
    while most - least > 1e-3:
        middle = (least + most) / 2
        if _chance(count, made, right, middle, delta) > 1 - CONFIDENCE:
            most = middle
        else:
            least = middle
    return least


def _chance(count: int, made: int, right: int, epsilon: float, delta: float) -> float:
    """Returns a bound on the chance of so many right guesses under (epsilon, delta)-privacy."""
    from scipy.stats import binom

    each = 1 / (1 + math.exp(-epsilon))
    at_least = binom.sf(right - 1, made, each)
    # delta lets a training fail: i guesses more may be right, at a cost that is shared among them.
    more = np.cumsum(binom.pmf(right - np.arange(1, right + 1), made, each)) / np.arange(1, right + 1)
    return float(min(1.0, at_least + 2 * count * delta * more.max(initial=0.0)))
