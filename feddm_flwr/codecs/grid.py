"""Codecs that give every value a digit on a grid whose step is set for each block of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feddm_flwr.codecs import packing
from feddm_flwr.codecs.base import LARGEST, Codec, Planes, State, largest_of
from feddm_flwr.codecs.packing import from_bfloat16, to_bfloat16

#: Shares of a block's largest magnitude that are tried as its clipping range.
_CLIP_RATIOS = (0.95, 0.85, 0.75, 0.65, 0.55, 0.45)
#: A ternary value is not zero where its magnitude is above this many times the block's mean. The
#: least squared error is at 0.7 (Li et al. 2016, ternary weight networks); more zeros cost fewer bits.
_TERNARY_THRESHOLD = 1.0


@dataclass(frozen=True)
class Grid(Codec):
    """Every value gets a digit 0..levels-1 and stands for (digit - (levels - 1) / 2) * step, with one
    step, a bfloat16, for each block of values. Digits are packed `per_byte` to a byte.

    The step is the least with which nothing is clipped: the error is at most half a step. With
    `clip_search`, of a few narrower ranges that with the least squared error is taken for each block
    (calibration by mean squared error, as in Banner et al. 2019). With `stochastic`, rounding is
    random and unbiased (QSGD, Alistarh et al. 2017): the error is at most a step, its mean zero.
    """

    name: ClassVar[str]
    levels: ClassVar[int]
    per_byte: ClassVar[int]
    block_size: int = 256
    clip_search: int = 0
    stochastic: int = 0

    def init(self, vector: Tensor, seed: int) -> State:
        largest_of(vector)
        return torch.Generator(vector.device).manual_seed(seed) if self.stochastic else None

    def encode(self, values: Tensor, state: State) -> Planes:
        blocks = values.new_zeros(self._blocks(len(values)), self.block_size)
        blocks.view(-1)[: len(values)] = values
        if isinstance(state, torch.Generator):
            steps = self._widest(blocks)
            chance = torch.rand(blocks.shape, generator=state, device=blocks.device)
            digits = self._digits(blocks, steps, chance)
        else:
            steps, digits = self._quantize(blocks, len(values))
        packed = packing.pack(digits.view(-1)[: len(values)], self.levels, self.per_byte)
        return [packed, *to_bfloat16(steps)]

    def decode(self, planes: Planes, out: Tensor) -> None:
        size = len(out)
        steps = from_bfloat16(planes[1:], self._blocks(size), 2.1 * LARGEST)
        packing.unpack(planes[0], out, self.levels, self.per_byte)
        whole = size // self.block_size
        out[: whole * self.block_size].view(-1, self.block_size).mul_(steps[:whole, None])
        out[whole * self.block_size :].mul_(steps[whole:])

    def limits(self, size: int) -> list[int]:
        return [-(-size // self.per_byte), self._blocks(size), self._blocks(size)]

    def _blocks(self, size: int) -> int:
        return -(-size // self.block_size)

    def _widest(self, blocks: Tensor) -> Tensor:
        """Returns the least bfloat16 step for each block with which nothing is clipped."""
        return _round_up(blocks.abs().amax(1) * (2 / (self.levels - 1)))

    def _quantize(self, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Steps (B,) and digits (B, K) of blocks (B, K), which end in zeros after `size` values."""
        steps = widest = self._widest(blocks)
        digits = self._digits(blocks, steps)
        if self.clip_search:
            error = self._squared_error(blocks, digits, steps)
            for ratio in _CLIP_RATIOS:
                tried = _round_up(widest * ratio)
                clipped = self._digits(blocks, tried)
                clipped_error = self._squared_error(blocks, clipped, tried)
                better = clipped_error < error
                steps = torch.where(better, tried, steps)
                error = torch.where(better, clipped_error, error)
            digits = self._digits(blocks, steps)
        return steps, digits

    def _digits(self, blocks: Tensor, steps: Tensor, chance: Tensor | float = 0.5) -> Tensor:
        """Returns the digits of blocks (B, K) with the steps (B,): a fraction above 1 - chance is rounded up."""
        inverse = torch.where(steps > 0, 1 / steps, 0.0)  # a block of zeros, or one too small for a step
        scaled = (blocks * inverse[:, None]).add_(chance).add_((self.levels - 1) / 2)
        return scaled.floor_().clamp_(0, self.levels - 1).to(torch.uint8)

    def _squared_error(self, blocks: Tensor, digits: Tensor, steps: Tensor) -> Tensor:
        # Squared in float64, where it cannot overflow.
        error = (digits.float() - (self.levels - 1) / 2) * steps[:, None] - blocks
        return error.double().square_().sum(1)


class Int8(Grid):
    """`int8`: -127..127."""

    name: ClassVar[str] = "int8"
    levels: ClassVar[int] = 255
    per_byte: ClassVar[int] = 1


class Int4(Grid):
    """`int4`: -7..7."""

    name: ClassVar[str] = "int4"
    levels: ClassVar[int] = 15
    per_byte: ClassVar[int] = 2


class Int3(Grid):
    """`int3`: -3..3."""

    name: ClassVar[str] = "int3"
    levels: ClassVar[int] = 7
    per_byte: ClassVar[int] = 2


class Int2(Grid):
    """`int2`: ternary, -1, 0 or 1, at 1.4 bits and less after entropy coding.

    A value is not zero where its magnitude exceeds the block's mean; the step is the mean
    magnitude of those that are not, which is the least-squares fit (Li et al. 2016, eq. 6). What is
    lost is less than what is there: |v - decoded|^2 = |v|^2 - (count not zero) * step^2.
    """

    name: ClassVar[str] = "int2"
    levels: ClassVar[int] = 3
    per_byte: ClassVar[int] = 5

    def _quantize(self, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
        magnitudes = blocks.abs()
        threshold = magnitudes.sum(1) / _counts(blocks, size) * _TERNARY_THRESHOLD
        large = magnitudes >= torch.minimum(threshold, magnitudes.amax(1))[:, None]  # whatever the mean's rounding
        steps = (magnitudes * large).sum(1) / large.sum(1)
        digits = (large * blocks.sign()).add_(1).to(torch.uint8)
        return steps, digits


class Sign(Grid):
    """`sign`: one bit; a value stands for its block's mean magnitude with its own sign (signSGD with
    error feedback, Karimireddy et al. 2019). |v - decoded|^2 = |v|^2 - |v|_1^2 / K."""

    name: ClassVar[str] = "sign"
    levels: ClassVar[int] = 2
    per_byte: ClassVar[int] = 8

    def _quantize(self, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return blocks.abs().sum(1) / _counts(blocks, size) * 2, (blocks >= 0).to(torch.uint8)


def _counts(blocks: Tensor, size: int) -> Tensor:
    """Returns how many of a block's values are not padding, (B,)."""
    ends = torch.arange(1, len(blocks) + 1, device=blocks.device) * blocks.shape[1]
    return blocks.shape[1] - (ends - size).clamp_(min=0)


def _round_up(steps: Tensor) -> Tensor:
    """Returns the least bfloat16 >= each step >= 0, as float32; those without a normal inverse become 0."""
    rounded = ((steps.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(steps < 2 * torch.finfo(torch.float32).tiny, 0.0, rounded)


class Middle4(Grid):
    """16 levels without a zero."""

    levels: ClassVar[int] = 16
    per_byte: ClassVar[int] = 2


class Middle2(Grid):
    """Four levels without a zero."""

    levels: ClassVar[int] = 4
    per_byte: ClassVar[int] = 4

    def _quantize(self, blocks: Tensor, size: int) -> tuple[Tensor, Tensor]:
        magnitudes = blocks.abs()
        counts = _counts(blocks, size)
        steps = magnitudes.sum(1) / counts
        there = torch.arange(blocks.shape[1], device=blocks.device) < counts[:, None]
        for _ in range(3):  # Lloyd's algorithm: assign levels, fit the step
            level = torch.where(magnitudes > steps[:, None], 1.5, 0.5) * there
            steps = (magnitudes * level).sum(1) / level.square().sum(1)
        steps = steps.to(torch.bfloat16).float()
        return steps, self._digits(blocks, steps)
