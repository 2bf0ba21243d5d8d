"""Codecs: how float32 values become bytes. Each is pure: `init`, `encode`, `decode`.

A codec works on one chunk of the flat vector at a time (see `wire`), so that any chunk can be
decoded alone. State that it carries from chunk to chunk and from round to round is passed in and
out; a codec without state passes `None`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from feddm_flwr import wire

Values = NDArray[np.float32]
State: TypeAlias = object  # what a codec carries on; None where that is nothing


class Codec(Protocol):
    """What the exchange asks of a codec. A dataclass whose fields are its options, all integers."""

    name: ClassVar[str]

    def init(self, size: int) -> State:
        """The state before the first vector of `size` values."""

    def encode(self, values: Values, state: State) -> tuple[bytes, State]:
        """The bytes of one chunk, exactly `raw_bytes(len(values))` of them, and the next state.

        Raises:
            ValueError: a value is NaN or infinite.
        """

    def decode(self, raw: bytes, size: int) -> Values:
        """The values of one chunk: any bytes of the right number decode to finite values or raise.

        Raises:
            wire.FrameError: the bytes do not stand for finite values.
        """

    def raw_bytes(self, size: int) -> int:
        """How many bytes `encode` makes of `size` values, before zstd."""


def _refuse_non_finite(values: Values) -> None:
    if not np.isfinite(values).all():
        raise ValueError("the vector has NaN or infinite values and cannot be encoded")


@dataclass(frozen=True)
class Identity:
    """`none`: float32 as it is. Bytes are grouped by significance, which lets zstd save a little."""

    name: ClassVar[str] = "none"

    def init(self, size: int) -> State:
        return None

    def encode(self, values: Values, state: State) -> tuple[bytes, State]:
        _refuse_non_finite(values)
        planes = values.astype("<f4", copy=False).view(np.uint8).reshape(-1, 4)
        return planes.T.tobytes(), None

    def decode(self, raw: bytes, size: int) -> Values:
        planes = np.frombuffer(raw, np.uint8).reshape(4, size)
        values: Values = np.ascontiguousarray(planes.T).view("<f4").reshape(size).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise wire.FrameError("the frame has NaN or infinite values")
        return values

    def raw_bytes(self, size: int) -> int:
        return 4 * size


#: Values beyond this are no model's; below it no scale and no product of a code and a scale overflows.
_LARGEST = np.float32(1e38)
#: Shares of a block's largest magnitude that are tried as its clipping range.
_CLIP_RATIOS = (0.99, 0.95, 0.9, 0.8, 0.6)


@dataclass(frozen=True)
class Int8:
    """`int8`: each block of values is scaled to -127..127 and rounded to the nearest integer.

    The scale is a bfloat16, which has float32's range, rounded up so that nothing is clipped by its
    rounding. With `clip_search`, of a few clipping ranges the one with the least squared error is
    taken for each block (post-training calibration by mean squared error, as in Banner et al. 2019).
    Error: at most scale / 2 per value where nothing is clipped; the block's largest magnitude is at
    most 127 scales.
    """

    name: ClassVar[str] = "int8"
    block_size: int = 256
    clip_search: int = 1

    def init(self, size: int) -> State:
        return None

    def encode(self, values: Values, state: State) -> tuple[bytes, State]:
        _refuse_non_finite(values)
        blocks = np.zeros((self._blocks(len(values)), self.block_size), np.float32)
        blocks.reshape(-1)[: len(values)] = values
        largest = np.abs(blocks).max(1, initial=0)
        if largest.max(initial=0) > _LARGEST:
            raise ValueError(f"the vector has values above {_LARGEST:.1e} and cannot be encoded as int8")
        scales = _scales(largest)
        codes = _quantize(blocks, scales)
        if self.clip_search:
            with np.errstate(over="ignore"):  # an infinite error is never the least
                self._search(blocks, largest, codes, scales)
        high = (scales.view(np.uint32) >> 16).astype("<u2")
        return codes.reshape(-1)[: len(values)].tobytes() + high.tobytes(), None

    def decode(self, raw: bytes, size: int) -> Values:
        codes = np.frombuffer(raw, np.int8, size)
        high = np.frombuffer(raw, "<u2", self._blocks(size), offset=size)
        scales = (high.astype(np.uint32) << 16).view(np.float32)
        if not (np.abs(scales) <= _LARGEST / 64).all():  # also false for NaN
            raise wire.FrameError("the frame has scales that are not finite or too large")
        values: Values = codes.astype(np.float32)
        values *= np.repeat(scales, self.block_size)[:size]
        return values

    def raw_bytes(self, size: int) -> int:
        return size + 2 * self._blocks(size)

    def _blocks(self, size: int) -> int:
        return -(-size // self.block_size)

    def _search(self, blocks: Values, largest: Values, codes: NDArray[np.int8], scales: Values) -> None:
        """Replace codes and scales, in place, where a narrower range has a smaller squared error."""
        error = _squared_error(blocks, codes, scales)
        for ratio in _CLIP_RATIOS:
            tried = _scales(largest * np.float32(ratio))
            # The largest magnitude alone would lose this much: few blocks can gain at 8 bits.
            hopeful = np.flatnonzero(np.square(largest - 127 * tried) < error)
            clipped = _quantize(blocks[hopeful], tried[hopeful])
            clipped_error = _squared_error(blocks[hopeful], clipped, tried[hopeful])
            better = clipped_error < error[hopeful]
            chosen = hopeful[better]
            codes[chosen], scales[chosen], error[chosen] = clipped[better], tried[chosen], clipped_error[better]


def _quantize(blocks: Values, scales: Values) -> NDArray[np.int8]:
    """Codes -127..127 of blocks (B, K) with the scales (B,)."""
    # A block of zeros, or one too small for a normal scale, is all zeros.
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.rint(blocks * inverse[:, None])
    return np.clip(codes, -127, 127, out=codes).astype(np.int8)


def _scales(ranges: Values) -> Values:
    """The smallest bfloat16 >= range / 127 for each range >= 0, as float32; subnormal ones become 0."""
    x = ranges / np.float32(127)
    rounded = ((x.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(x < np.finfo(np.float32).tiny, np.float32(0), rounded).astype(np.float32)


def _squared_error(blocks: Values, codes: NDArray[np.int8], scales: Values) -> Values:
    error = blocks - codes * scales[:, None]
    result: Values = np.einsum("bk,bk->b", error, error)
    return result


REGISTRY: dict[str, type[Identity] | type[Int8]] = {codec.name: codec for codec in (Identity, Int8)}


def make(name: str, **options: int) -> Codec:
    """The codec of that name, with those of the options that it has."""
    kind = REGISTRY[name]
    return kind(**{field.name: options[field.name] for field in fields(kind)})
