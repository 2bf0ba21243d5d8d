"""Which updates are too long to be true, or to be taken as they are: judged by those of earlier rounds.

The measure is the median norm, for each local step, of the updates that were accepted in the last rounds
that were committed, so that no reply of a round can shift the measure for the others of that round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from feddm_flwr.aggregation import Vector, euclidean_norm

#: Rounds that the median looks back on.
_ROUNDS = 5
#: In the first round, the most that an update may change a parameter by, in the mean square.
_FIRST = 1.0

Norms = Mapping[str, list[float]]  # by part of the model


class Outliers:
    """The norms of the last committed rounds, and what follows from them."""

    def __init__(self, limit: float, clip: float) -> None:
        """Updates above `limit` times the median are refused, those above `clip` times shortened; 0: neither."""
        self._limit, self._clip = limit, clip
        self._rounds: dict[str, list[list[float]]] = {}

    def judge(self, part: str, update: Vector, steps: int = 1) -> tuple[float, float]:
        """The norm of an update of a part that came of so many local steps, and the factor by which it is to be
        shortened.

        Raises:
            ValueError: it is far longer than those of earlier rounds.
        """
        norm = euclidean_norm(update)
        earlier = [norm for norms in self._rounds.get(part, []) for norm in norms]
        usual = steps * median(earlier) if earlier else 0.0
        if not usual:
            cap = _FIRST * math.sqrt(len(update))
            if self._limit and norm > cap:
                raise ValueError(f"norm {norm:.3g}: in the first round at most {cap:.3g}, {_FIRST:g} for a parameter")
            return norm, 1.0
        if self._limit and norm > self._limit * usual:
            raise ValueError(
                f"norm {norm:.3g}: more than server.norm-limit = {self._limit:g} times the median of {usual:.3g} "
                "in earlier rounds"
            )
        return norm, min(1.0, self._clip * usual / norm) if self._clip and norm else 1.0

    def commit(self, norms: Norms) -> None:
        """Remember the norms for a step that were accepted in a round, as they were before shortening."""
        for part, values in norms.items():
            self._rounds[part] = [*self._rounds.get(part, []), sorted(values)][-_ROUNDS:]

    def state(self) -> dict[str, list[list[float]]]:
        """What `restore` takes."""
        return dict(self._rounds)

    def restore(self, state: dict[str, list[list[float]]]) -> None:
        """Go on from a `state`."""
        self._rounds = dict(state)
