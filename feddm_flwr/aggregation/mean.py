"""A streaming mean whose bits do not depend on the order in which updates arrive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from feddm_flwr.aggregation.base import Aggregator
from feddm_flwr.vector import PIECE, Vector

#: Binary places of the fixed-point sum: 2^-32 is far below float32's resolution of weights.
FRACTION_BITS = 32
_LIMIT = 2.0**62
#: Added to a float64 below 2^51 it leaves the nearest integer in the low bits: rounding and conversion in one addition.
_ROUNDING = np.float64(1.5 * 2.0**52)


class StreamingMean(Aggregator):
    """The weighted mean of vectors that are added one by one and can be freed at once.

    Each vector enters as `round(weight * v * 2^S)` in 64-bit integers, whose addition is associative:
    the mean has the same bits whatever the order. Memory: 8 bytes per value, however many vectors.
    """

    def __init__(self, size: int, total_weight: int) -> None:
        """`total_weight` is what all vectors that may come weigh together."""
        self._total = total_weight
        self._sum: NDArray[np.int64] = np.zeros(size, np.int64)
        self._offset = np.zeros((), np.int64)  # what the sums have too much, modulo 2^64 as they are
        self.weight = 0
        self._count = 0

    @property
    def count(self) -> int:
        """Vectors added."""
        return self._count

    def check(self, vector: Vector) -> None:
        """Raises a ValueError where the values are so large that a sum of such vectors could overflow."""
        self._largest(vector)

    def add(self, vector: Vector, weight: int, frame: bytes = b"", scale: float = 1.0) -> None:
        """Adds a finite vector, weighted by a number of images; other rules need its `frame` and `scale`.

        Raises:
            ValueError: the values are so large that a sum of such vectors could overflow; nothing
                was added then. This too does not depend on the order.
        """
        assert 1 <= weight <= self._total - self.weight, (weight, self.weight, self._total)
        factor = weight * 2.0**FRACTION_BITS
        small = self._largest(vector) * factor < 2.0**51
        scaled = np.empty(PIECE)
        for start in range(0, len(vector), PIECE):
            values, total = vector[start : start + PIECE], self._sum[start : start + PIECE]
            part = scaled[: len(values)]
            part[:] = values
            part *= factor
            if small:
                part += _ROUNDING
                total += part.view(np.int64)
            else:
                total += np.rint(part).astype(np.int64)
        if small:
            self._offset += _ROUNDING.view(np.int64)
        self.weight += weight
        self._count += 1

    def _largest(self, vector: Vector) -> float:
        """Returns the largest magnitude of a vector that can be added.

        Raises:
            ValueError: it cannot.
        """
        largest = float(max(vector.max(initial=0), -vector.min(initial=0)))
        if not largest * self._total * 2.0**FRACTION_BITS < _LIMIT:
            raise ValueError(f"the update has values up to {largest:.3g}: too large to add up exactly")
        return largest

    def mean(self) -> Vector:
        """Returns the mean as float32; zeros where nothing was added."""
        divisor = max(self.weight, 1) * 2.0**FRACTION_BITS
        result = np.empty(len(self._sum), np.float32)
        for start in range(0, len(result), PIECE):
            result[start : start + PIECE] = (self._sum[start : start + PIECE] - self._offset) / divisor
        return result
