"""Figures of the nodes as figures of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import pstdev

from feddm_flwr.config import NOISE_LEVELS


def weighted(values: Iterable[tuple[str, float, int]]) -> float:
    """Returns the mean weighted by the third entry, summed in order of name so that its bits are fixed; NaN of none."""
    ordered = sorted(values)
    return sum(v * w for _, v, w in ordered) / sum(w for _, _, w in ordered) if ordered else math.nan


def weighted_levels(values: Iterable[tuple[str, list[float], int]]) -> list[float]:
    """Returns the same of lists of equal length, place by place."""
    ordered = [*values]
    return [
        weighted((name, levels[i], w) for name, levels, w in ordered) for i in range(NOISE_LEVELS if ordered else 0)
    ]


def spread(losses: list[float]) -> float:
    """Returns the standard deviation of the nodes' held-out losses; one of fewer images than noise levels is of some
    levels only."""
    return pstdev(losses) if losses else math.nan
