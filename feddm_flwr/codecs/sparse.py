"""Codecs that say which few values matter, and code those; the others are zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.codecs import packing
from feddm_flwr.codecs.base import LARGEST, Codec, Planes, State, largest_of
from feddm_flwr.codecs.framing import FrameError, compress
from feddm_flwr.codecs.grid import Grid, Middle2, Middle4
from feddm_flwr.codecs.packing import bytes_of, numbers_of


@dataclass(frozen=True)
class TopK(Codec):
    """`topk`: of each chunk the `per_million` largest magnitudes, the rest is zero; their values at
    2 or 4 bits (sparsification as in SparseLoCo, Sarfi et al. 2025).

    4 bits: a grid of 16 levels that clips nothing. 2 bits: four levels, -3/2, -1/2, 1/2 and 3/2
    steps, with the step fitted by least squares: the squared error is less than |v|^2.
    """

    name: ClassVar[str] = "topk"
    sparse: ClassVar[bool] = True
    per_million: int = 50_000
    bits: int = 2
    block_size: int = 256

    def init(self, vector: Tensor, seed: int) -> State:
        largest_of(vector)
        return None

    def encode(self, values: Tensor, state: State) -> Planes:
        count = self._count(len(values))
        if count == 0:
            return [b""] * len(self.limits(0))
        positions = values.abs().topk(count, sorted=False).indices.sort().values
        chosen = self._grid().encode(values[positions], None)
        return [*packing.to_gaps(positions, len(values)), *chosen]

    def decode(self, planes: Planes, out: Tensor) -> None:
        count = self._count(len(out))
        positions = packing.from_gaps(planes[:3], len(out))
        if len(positions) != count:
            raise FrameError(f"the frame has {len(positions)} values of a chunk, not {count}")
        chosen = torch.empty(count)
        self._grid().decode(planes[3:], chosen)
        out.zero_()[positions] = chosen

    def limits(self, size: int) -> list[int]:
        groups, count = -(-size // packing.GROUP), self._count(size)
        return [groups, groups, count, *self._grid().limits(count)]

    def _count(self, size: int) -> int:
        return -(-size * self.per_million // 1_000_000)

    def _grid(self) -> Grid:
        return (Middle4 if self.bits == 4 else Middle2)(self.block_size)


#: A magnitude of x steps gets the whole number floor(x + this): fewer ones, which are dear in bits,
#: for a little more error (the dead zone of Sullivan 1996).
_DEAD_ZONE = 1 / 3
_MOST = 16383  # steps that a magnitude can have; larger ones are clipped
_ESCAPE = 3  # magnitudes above this many steps are written out apart
_SAMPLE = 1 << 20  # values that the search for the step looks at


@dataclass(frozen=True)
class Budget(Codec):
    """`budget`: as little squared error as `ratio` (times fewer bytes than float32) allows.

    One step for the whole vector, entropy-coded, with a dead zone: at the least total error for a
    number of bits every part of a vector has the same slope of error over bits (Shoham and Gersho
    1988), and for entropy-coded uniform quantizers equal slope means an equal step (Gish and Pierce
    1968). So parts that vary much get many bits, parts below the step none: bits go by measured
    distortion, block by block, without being told. The step is found by bisection on the coded
    size. A magnitude of c steps stands for (c - offset) * step, the offset fitted by least squares.
    """

    name: ClassVar[str] = "budget"
    sparse: ClassVar[bool] = True
    ratio: int = 80

    def init(self, vector: Tensor, seed: int) -> State:
        largest = largest_of(vector)
        if largest == 0:
            return 0.0
        groups = vector[: len(vector) // packing.GROUP * packing.GROUP].view(-1, packing.GROUP)
        sample = groups[:: -(-len(vector) // _SAMPLE)].reshape(-1) if len(groups) else vector
        target = 4 * len(sample) / self.ratio
        # At the upper end nothing is sent; just below it, the largest values alone.
        low, high = math.log(largest / _MOST), math.log(largest / (1 - _DEAD_ZONE) * 1.001)
        for _ in range(24):
            middle = (low + high) / 2
            size = len(compress(self.encode(sample, math.exp(middle))))
            low, high = (middle, high) if size > target else (low, middle)
            if 0.99 * target < size <= target:
                break
        # Where not even one value fits, the largest go all the same: nothing would ever be learnt.
        return min(math.exp(high), largest / (1 - _DEAD_ZONE) * (1 - 1e-6))

    def encode(self, values: Tensor, state: State) -> Planes:
        assert isinstance(state, float)
        scaled = values.abs() * (1 / state if state > 0 else 0.0)
        positions = torch.nonzero(scaled >= 1 - _DEAD_ZONE).view(-1)
        scaled = scaled[positions]
        counts = (scaled + _DEAD_ZONE).floor_().clamp_(1, _MOST)
        offset = (counts - scaled).double().mean().float() if len(counts) else scaled.new_zeros(())
        more = counts.to(torch.int16) - 1
        return [
            *packing.to_gaps(positions, len(values)),
            packing.pack((values[positions] < 0).to(torch.uint8), 2, 8),
            packing.pack(more.clamp(max=_ESCAPE).to(torch.uint8), 1 + _ESCAPE, 4),
            *bytes_of(more[more >= _ESCAPE], "<i2"),
            *bytes_of(torch.stack([torch.tensor(state), offset.cpu().clamp_(-1, 1)]), "<f4"),
        ]

    def decode(self, planes: Planes, out: Tensor) -> None:
        positions = packing.from_gaps(planes[:3], len(out))
        count = len(positions)
        signs = packing.unpack(planes[3], torch.empty(count), 2, 8)  # 1/2 where negative, -1/2 where not
        more = packing.unpack(planes[4], torch.empty(count), 1 + _ESCAPE, 4) + _ESCAPE / 2
        escaped = more == _ESCAPE
        more[escaped] = torch.from_numpy(numbers_of(planes[5:7], int(escaped.sum()), "<i2").astype(np.float32))
        step, offset = numbers_of(planes[7:], 2, "<f4")
        if not (0 <= step <= 2 * LARGEST and -1 <= offset <= 1 and bool((more >= 0).all())):
            raise FrameError("the frame has a step, an offset or magnitudes that are out of range")
        out.zero_()[positions] = -2 * signs * ((more + 1 - float(offset)) * float(step))

    def limits(self, size: int) -> list[int]:
        groups = -(-size // packing.GROUP)
        return [groups, groups, size, -(-size // 8), -(-size // 4), size, size, 2, 2, 2, 2]
