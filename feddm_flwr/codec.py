"""Codecs: how float32 values become few bytes. Each is pure: `init`, `encode`, `decode`.

A codec codes a flat vector in chunks (see `wire`), each decodable alone, and each as a few *planes*:
byte strings of like content that are entropy-coded apart. Besides the plain number formats here:

- `grid_codec` (`int8`, `int4`, `int3`, `int2`, `sign`): every value gets a digit on a grid whose
  step is set for each block of values.
- `sparse_codec` (`topk`, `budget`): which few values matter, and those.

Vectors may lie on a GPU: all but the entropy coding is done where they are. Decoding is done on the
CPU in float32, without sums, so that every machine gets the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.config import CODECS
from feddm_flwr.grid_codec import Int2, Int3, Int4, Int8, Sign
from feddm_flwr.packing import LARGEST, Planes, State, bytes_of, from_bfloat16, largest_of, numbers_of, to_bfloat16
from feddm_flwr.sparse_codec import Budget, TopK
from feddm_flwr.wire import FrameError


class Codec(Protocol):
    """What the exchange asks of a codec. A dataclass whose fields are its options, all integers."""

    name: ClassVar[str]

    def init(self, vector: Tensor, seed: int) -> State:
        """The state before the first chunk of a vector; `seed` is for codecs that draw at random.

        Raises:
            ValueError: a value is NaN, infinite or beyond `LARGEST`.
        """

    def encode(self, values: Tensor, state: State) -> Planes:
        """The planes of one chunk of the vector."""

    def decode(self, planes: Planes, out: Tensor) -> None:
        """Put the values of one chunk into `out`, float32 (n,): any planes within the limits decode to finite
        values or raise.

        Raises:
            FrameError: the planes do not stand for that many finite values.
        """

    def limits(self, size: int) -> list[int]:
        """The most bytes that each plane of a chunk of `size` values can have."""


@dataclass(frozen=True)
class Identity:
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
class BFloat16:
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
class Float16:
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


REGISTRY: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Identity, Float16, BFloat16, Int8, Int4, Int3, Int2, Sign, TopK, Budget)
}


assert tuple(REGISTRY) == CODECS, "the configuration offers other codecs than there are"


def make(name: str, **options: int) -> Codec:
    """The codec of that name, with those of the options that it has."""
    kind = REGISTRY[name]
    return kind(**{field.name: options[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def options_of(codec: Codec) -> dict[str, int]:
    """The options of a codec, as `make` takes them."""
    return {field.name: getattr(codec, field.name) for field in fields(codec)}  # type: ignore[arg-type]
