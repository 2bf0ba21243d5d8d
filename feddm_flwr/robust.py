"""Coordinate-wise trimmed mean and median (Yin et al. 2018, arXiv 1803.01498): a few nodes that send
nonsense, or lies, cannot move the result far. Every node counts alike, whatever number of images it claims.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO

import numpy as np

from feddm_flwr.aggregation import Vector

_SLICE = 1 << 16  # values that are sorted at a time

#: The updates in a coded reply, one chunk after the other.
Decode = Callable[[mmap], Iterator[Vector]]


class RobustMean:
    """A `StreamingMean` by another rule, which needs all replies of a round.

    They are spooled to disk as they came, coded, and decoded chunk by chunk. Memory: one chunk of each.
    """

    def __init__(self, size: int, trim: float, decode: Decode, folder: Path) -> None:
        """Of n replies, the floor(trim * n) largest and smallest values of every coordinate do not count; 0.5
        is the median. `folder` is where the spool lies; it has no name there and ends with the process."""
        self._size, self._trim, self._decode, self._folder = size, trim, decode, folder
        self._spool: list[tuple[IO[bytes], float]] = []

    @property
    def count(self) -> int:
        """Vectors added."""
        return len(self._spool)

    def add(self, vector: Vector, weight: int, frame: bytes, scale: float) -> None:
        """Add the coded update in `frame`, times `scale`; `vector` is the same, decoded.

        Raises:
            OSError: the disk is full.
        """
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (open until the mean is made)
        file.write(frame)
        file.flush()
        self._spool.append((file, scale))

    def mean(self) -> Vector:
        """The result as float32; zeros where nothing was added. It does not depend on the order."""
        result = np.zeros(self._size, np.float32)
        count, start = self.count, 0
        dropped = min(math.floor(self._trim * count), (count - 1) // 2)
        replies = [(self._decode(mmap(file.fileno(), 0, access=ACCESS_READ)), scale) for file, scale in self._spool]
        for chunks in zip(*(chunks for chunks, _ in replies), strict=True):
            for begin in range(0, len(chunks[0]), _SLICE):
                parts = (np.float32(s) * c[begin : begin + _SLICE] for c, (_, s) in zip(chunks, replies, strict=True))
                values = np.sort(np.stack([*parts]), axis=0)[dropped : count - dropped]
                result[start : start + values.shape[1]] = values.mean(axis=0, dtype=np.float64)
                start += values.shape[1]
        for file, _ in self._spool:
            file.close()
        return result
