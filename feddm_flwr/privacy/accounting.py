"""What steps of DP-SGD cost, by privacy loss distributions (the package dp-accounting).

A record is an image. Neighbouring sets differ in one record that is there or is not, under a number of records that
everybody knows (zero-out adjacency; Ponomareva et al. 2023, section 2.1): the share of the records that a batch has
tells nothing then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from feddm_flwr.config.privacy import LEAST_NOISE

_PRECISION = 1e-3  # of privacy losses; they are rounded up: a coarser one never gives less than is spent
_NOTHING = 200.0  # an epsilon that hides nothing
_PARTS = 1000  # a noise multiplier is found to one of these


@dataclass(frozen=True, order=True)
class Steps:
    """Steps of DP-SGD of a kind."""

    sampling: float  # the probability of each record to be in a batch
    noise: float  # standard deviation of the noise over what a record can change
    count: int


@dataclass(frozen=True)
class Rounds:
    """Rounds of DP-FedAvg of a kind."""

    nodes: int  # of which some are drawn
    asked: int  # how many, without replacement
    noise: float  # standard deviation of the noise over the norm that updates are clipped to, of their sum
    count: int


def epsilon(spent: Iterable[Steps], delta: float) -> float:
    """Returns the least epsilon for which all these steps together are known to be (epsilon, delta)-private."""
    counts: dict[tuple[float, float], int] = {}
    for one in spent:
        counts[one.sampling, one.noise] = counts.get((one.sampling, one.noise), 0) + one.count
    return _epsilon(tuple(sorted(Steps(*kind, count) for kind, count in counts.items())), delta)


@lru_cache(maxsize=256)
def _epsilon(spent: tuple[Steps, ...], delta: float) -> float:
    if not spent:
        return 0.0
    library = _library()
    renyi = _composed(library.rdp.RdpAccountant(), spent, delta)
    if not renyi <= _NOTHING:  # which is no privacy; the distributions would fill the memory
        return math.inf
    # Of tiny losses, the rounding of the distributions is more.
    return min(renyi, _composed(library.pld.PLDAccountant(value_discretization_interval=_PRECISION), spent, delta))


def _composed(accountant: Any, spent: tuple[Steps, ...], delta: float) -> float:
    library = _library()
    for one in spent:
        batch = library.PoissonSampledDpEvent(one.sampling, library.GaussianDpEvent(one.noise))
        accountant.compose(library.SelfComposedDpEvent(batch, one.count))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def noise_for(limit: float, delta: float, sampling: float, count: int) -> float:
    """Returns the least noise multiplier, to three decimals, with which so many steps cost at most `limit`."""
    return _least_noise(limit, lambda noise: epsilon([Steps(sampling, noise, count)], delta))


def epsilon_of_rounds(spent: Iterable[Rounds], delta: float) -> float:
    """Returns the least epsilon for which all these rounds together are known to be (epsilon, delta)-private, where
    neighbouring federations differ in what one node has (replace-one; Wang et al. 2019, arXiv 1808.00087, theorem 27).
    An update in place of another changes their sum by twice the norm that they are clipped to."""
    library = _library()
    accountant = library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)
    for one in (spent := [*spent]):
        gaussian = library.GaussianDpEvent(one.noise / 2)
        accountant.compose(library.SampledWithoutReplacementDpEvent(one.nodes, one.asked, gaussian), one.count)
    return float(accountant.get_epsilon(delta)) if spent else 0.0


def noise_for_rounds(limit: float, delta: float, nodes: int, asked: int, count: int) -> float:
    """Returns the least noise multiplier, to three decimals, with which so many rounds cost at most `limit`."""
    return _least_noise(limit, lambda noise: epsilon_of_rounds([Rounds(nodes, asked, noise, count)], delta))


def _least_noise(limit: float, cost: Callable[[float], float]) -> float:
    """Returns the least noise multiplier that costs at most `limit`: more noise costs less."""
    least, most = round(LEAST_NOISE * _PARTS) - 1, round(LEAST_NOISE * _PARTS)
    while cost(most / _PARTS) > limit:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (most + least) // 2
        least, most = (least, middle) if cost(middle / _PARTS) <= limit else (middle, most)
    return most / _PARTS


def _library() -> Any:
    import dp_accounting
    from dp_accounting import pld, rdp  # noqa: F401  (which are then its attributes)

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of orders that it leaves out
    return dp_accounting
