"""Which updates are too long to be true, or to be taken as they are: judged by those of earlier rounds.

The measure is the median of the updates that were accepted in the last rounds that were committed, brought to the
same number of local steps, so that no reply of a round can shift the measure for the others of that round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from feddm_flwr.vector import Vector, euclidean_norm

#: Rounds that the median looks back on.
_ROUNDS = 5
#: In the first round, the most that an update may change a parameter by, in the mean square.
_FIRST = 1.0

#: The most steps that an update is taken to be of, in medians of earlier ones: a node may say what it likes.
_MORE = 10

#: Norm and local steps of updates.
Lengths = list[tuple[float, int]]
Norms = Mapping[str, Lengths]  # by part of the model


class Outliers:
    """The norms of the last committed rounds, and what follows from them."""

    def __init__(self, limit: float, clip: float) -> None:
        """Updates above `limit` times the median are refused, those above `clip` times shortened; 0: neither."""
        self._limit, self._clip = limit, clip
        self._rounds: dict[str, list[Lengths]] = {}

    def check(self, part: str, update: Vector, steps: int = 1, least: float = 0.0) -> tuple[float, float]:
        """Returns the norm of an update of a part that came of so many local steps, and the factor by which it is to be
        shortened. The measure is no shorter than the `least`, where there are earlier ones.

        Raises:
            ValueError: it is far longer than those of earlier rounds.
        """
        norm = euclidean_norm(update)
        earlier = [length for lengths in self._rounds.get(part, []) for length in lengths]
        usual = max(_usual(earlier, steps), least) if earlier else 0.0
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
        """Remembers what was accepted in a round, as it was before shortening."""
        for part, values in norms.items():
            self._rounds[part] = [*self._rounds.get(part, []), sorted(values)][-_ROUNDS:]

    def state(self) -> dict[str, list[Lengths]]:
        """Returns what `restore` takes."""
        return dict(self._rounds)

    def restore(self, state: dict[str, list[Lengths]]) -> None:
        """Goes on from a `state`."""
        self._rounds = dict(state)


def _usual(earlier: Lengths, steps: int) -> float:
    """Returns the norm that is to be expected of so many steps: in proportion to them, as where all go one way, or to
    their root, as where they are mostly noise (AdamW's first step is as long as any), whichever is longer."""
    most = min(steps, _MORE * median(s for _, s in earlier))
    return max(float(most**power * median(norm / s**power for norm, s in earlier)) for power in (1.0, 0.5))
