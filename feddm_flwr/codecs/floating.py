"""Codecs that are number formats: float32, bfloat16, float16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.codecs.base import LARGEST, Codec, Planes, State, largest_of
from feddm_flwr.codecs.framing import FrameError
from feddm_flwr.codecs.packing import bytes_of, from_bfloat16, numbers_of, to_bfloat16


@dataclass(frozen=True)
class Identity(Codec):
    """`none`: float32 as it is. Bytes are grouped by significance, which saves a little."""

    name: ClassVar[str] = "none"

    def init(self, vector: Tensor, seed: int) -> State:
        largest_of(vector)
        return None

    def encode(self, values: Tensor, state: State) -> Planes:
        return bytes_of(values, "<f4")

    def decode(self, planes: Planes, out: Tensor) -> None:
        values = torch.from_numpy(numbers_of(planes, len(out), "<f4"))
        if not bool((values.abs() <= LARGEST).all()):
            raise FrameError("the frame has values that are not finite or too large")
        out.copy_(values)

    def limits(self, size: int) -> list[int]:
        return [size] * 4


@dataclass(frozen=True)
class BFloat16(Codec):
    """`bf16`: rounded to nearest. Relative error at most 2^-8."""

    name: ClassVar[str] = "bf16"

    def init(self, vector: Tensor, seed: int) -> State:
        largest_of(vector)
        return None

    def encode(self, values: Tensor, state: State) -> Planes:
        return to_bfloat16(values)

    def decode(self, planes: Planes, out: Tensor) -> None:
        out.copy_(from_bfloat16(planes, len(out), 2 * LARGEST))

    def limits(self, size: int) -> list[int]:
        return [size] * 2


@dataclass(frozen=True)
class Float16(Codec):
    """`fp16`, in units of a power of two for the whole vector, so that its largest value is near the
    top of the range and nothing overflows. Error: at most 2^-11 of the value, or 2^-38 of the largest.
    """

    name: ClassVar[str] = "fp16"

    def init(self, vector: Tensor, seed: int) -> State:
        return max(-126, min(126, 15 - math.frexp(largest_of(vector))[1]))

    def encode(self, values: Tensor, state: State) -> Planes:
        assert isinstance(state, int)
        return [*bytes_of((values * 2.0**state).half(), "<f2"), np.int8(state).tobytes()]

    def decode(self, planes: Planes, out: Tensor) -> None:
        halves = torch.from_numpy(numbers_of(planes[:2], len(out), "<f2")).float()
        exponent = int(numbers_of(planes[2:], 1, "<i1")[0])
        if exponent < -85 or not bool(halves.isfinite().all()):
            raise FrameError("the frame has values that are not finite or too large")
        torch.mul(halves, 2.0**-exponent, out=out)

    def limits(self, size: int) -> list[int]:
        return [size, size, 1]
