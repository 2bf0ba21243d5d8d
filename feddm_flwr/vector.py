"""A model as one flat float32 vector, and the names and shapes of what is in it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
#: Of 64 bits, which are added modulo 2^64: what secure sums are of.
Words = NDArray[np.uint64]

#: Values that are worked on at a time: temporaries that stay in the cache are twice as fast as larger ones.
PIECE = 1 << 15


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters, in the order in which the flat vector holds them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of values in the flat vector."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that two layouts share only if names, shapes and order agree."""
        return hashlib.sha256(json.dumps([self.names, self.shapes]).encode()).hexdigest()[:32]


def euclidean_norm(vector: Vector, origin: Vector | None = None) -> float:
    """Returns the Euclidean norm, or distance from `origin`, summed in float64 piece by piece: finite if all values
    are."""
    pieces = (slice(start, start + PIECE) for start in range(0, len(vector), PIECE))
    parts = (vector[piece] if origin is None else vector[piece] - origin[piece] for piece in pieces)
    return math.sqrt(math.fsum(float(np.square(part, dtype=np.float64).sum()) for part in parts))
