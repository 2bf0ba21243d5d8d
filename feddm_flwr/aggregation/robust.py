"""Coordinate-wise trimmed mean and median (Yin et al. 2018, arXiv 1803.01498): a few nodes that send
nonsense, or lies, cannot move the result far. Every node counts alike, whatever number of images it claims.
"""

from __future__ import annotations

import math
import tempfile
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from feddm_flwr.aggregation.base import Aggregator, Decode
from feddm_flwr.vector import Vector

_SLICE = 1 << 16  # values that are sorted at a time


class RobustMean(Aggregator):
    """A `StreamingMean` by another rule, which needs all replies of a round.

    They are spooled to disk as they came, coded, and decoded chunk by chunk. Memory: one chunk of each.
    """

    def __init__(self, size: int, trim: float, decode: Decode, folder: Path) -> None:
        """Of n replies, the floor(trim * n) largest and smallest values of every coordinate do not count, but at
        least one of each where there are three replies: one liar must not get through because others were late. 0.5
        is the median. `folder` is where the spool lies; it has no name there and ends with the process."""
        self._size, self._trim, self._decode = size, trim, decode
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open until the mean is made)
        self._spool: list[tuple[slice, float]] = []

    @property
    def count(self) -> int:
        """Vectors added."""
        return len(self._spool)

    def add(self, vector: Vector, weight: int, frame: bytes, scale: float) -> None:
        """Adds the coded update in `frame`, times `scale`; `vector` is the same, decoded.

        Raises:
            OSError: the disk is full.
        """
        start = self._file.tell()
        self._file.write(frame)
        self._file.flush()
        self._spool.append((slice(start, start + len(frame)), scale))

    def mean(self) -> Vector:
        """Returns the result as float32; zeros where nothing was added. It does not depend on the order."""
        result = np.zeros(self._size, np.float32)
        count, start = self.count, 0
        if not count:
            return result
        dropped = min(max(1, math.floor(self._trim * count + 1e-9)), (count - 1) // 2)
        spool = memoryview(mmap(self._file.fileno(), 0, access=ACCESS_READ))
        replies = [(self._decode(spool[where]), scale) for where, scale in self._spool]
        for chunks in zip(*(chunks for chunks, _ in replies), strict=True):
            for begin in range(0, len(chunks[0]), _SLICE):
                parts = (np.float32(s) * c[begin : begin + _SLICE] for c, (_, s) in zip(chunks, replies, strict=True))
                values = np.sort(np.stack([*parts]), axis=0)[dropped : count - dropped]
                result[start : start + values.shape[1]] = values.mean(axis=0, dtype=np.float64)
                start += values.shape[1]
            del chunks, parts  # before the next ones are made
        self._file.close()
        return result
