"""What the exchange asks of a codec: how float32 values become few bytes. Each is pure: `init`, `encode`, `decode`.

A codec codes a flat vector in chunks (see `codecs.framing`), each decodable alone, and each as a few *planes*: byte
strings of like content that are entropy-coded apart. There are three kinds:

- `codecs.floating` (`none`, `fp16`, `bf16`): number formats.
- `codecs.grid` (`int8`, `int4`, `int3`, `int2`, `sign`): every value gets a digit on a grid whose step is set for each
  block of values.
- `codecs.sparse` (`topk`, `budget`): which few values matter, and those.

Vectors may lie on a GPU: all but the entropy coding is done where they are. Decoding is done on the CPU in float32,
without sums, so that every machine gets the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

Planes: TypeAlias = list[bytes]


State: TypeAlias = object  # what a codec carries through a vector; None where that is nothing


#: Values beyond this are no model's; below it no sum over a block and no decoded value overflows.
LARGEST = 1e30


def largest_of(vector: Tensor) -> float:
    """Returns the largest magnitude of a vector, shape (n,), that a codec is to encode.

    Raises:
        ValueError: a value is NaN, infinite or beyond `LARGEST`.
    """
    low, high = torch.aminmax(vector) if len(vector) else (torch.zeros(()), torch.zeros(()))
    largest = max(-float(low), float(high))
    if not largest <= LARGEST:  # also for NaN, which aminmax passes on
        raise ValueError(f"the vector has NaN, infinite values or values above {LARGEST:g} and cannot be encoded")
    return largest


class Codec(ABC):
    """A codec is a frozen dataclass whose fields are its options, all integers with a default."""

    #: What frames call it.
    name: ClassVar[str]
    #: Whether most values decode to 0: then deltas are coded, not weights, and no median is taken of them.
    sparse: ClassVar[bool] = False

    @abstractmethod
    def init(self, vector: Tensor, seed: int) -> State:
        """Returns the state before the first chunk of a vector; `seed` is for codecs that draw at random.

        Raises:
            ValueError: a value is NaN, infinite or beyond `LARGEST`.
        """

    @abstractmethod
    def encode(self, values: Tensor, state: State) -> Planes:
        """Returns the planes of one chunk of the vector."""

    @abstractmethod
    def decode(self, planes: Planes, out: Tensor) -> None:
        """Puts the values of one chunk into `out`, float32 (n,): any planes within the limits decode to finite values
        or raise.

        Raises:
            FrameError: the planes do not stand for that many finite values.
        """

    @abstractmethod
    def limits(self, size: int) -> list[int]:
        """Returns the most bytes that each plane of a chunk of `size` values can have."""
