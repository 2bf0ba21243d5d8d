"""Numbers as planes of bytes: what codecs are built from. No codec's choice is made here.

Planes of like bytes (all high bytes, all positions) are what an entropy coder does best on.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddm_flwr.codecs.base import Planes
from feddm_flwr.codecs.framing import FrameError

#: Positions are told within groups of this many values: a position or a gap is then one byte.
GROUP = 256


def bytes_of(values: Tensor, kind: str) -> Planes:
    """Returns numbers, shape (n,), as one plane of n bytes per byte of `kind`, a little-endian numpy type."""
    flat = values.cpu().numpy().astype(kind, copy=False)
    numbers = flat.view(f"<u{flat.itemsize}")
    # Shifts of whole numbers are several times as fast as strides of bytes.
    return [(numbers >> 8 * place).astype(np.uint8).tobytes() for place in range(flat.itemsize)]


def numbers_of(planes: Planes, size: int, kind: str) -> NDArray[np.generic]:
    """Returns the inverse of `bytes_of`: `size` numbers in the machine's own byte order.

    Raises:
        FrameError: a plane has another length.
    """
    if any(len(plane) != size for plane in planes):
        raise FrameError(f"planes of {[len(plane) for plane in planes]} bytes do not hold {size} numbers")
    numbers = np.zeros(size, f"<u{len(planes)}")
    for place, plane in enumerate(planes):
        numbers |= np.frombuffer(plane, np.uint8).astype(numbers.dtype) << 8 * place
    return numbers.view(kind).astype(np.dtype(kind).newbyteorder("="), copy=False)


def to_bfloat16(values: Tensor) -> Planes:
    """Returns two planes of n bytes: the values (n,) as bfloat16."""
    return bytes_of(values.to(torch.bfloat16).view(torch.int16), "<i2")


def from_bfloat16(planes: Planes, size: int, largest: float) -> Tensor:
    """Returns the inverse, as float32 (size,).

    Raises:
        FrameError: a plane has another length, or a value is above `largest` or not finite.
    """
    values = torch.from_numpy(numbers_of(planes, size, "<i2")).view(torch.bfloat16).float()
    if not bool((values.abs() <= largest).all()):  # also false for NaN
        raise FrameError("the frame has values or scales that are not finite or too large")
    return values


def pack(digits: Tensor, levels: int, per_byte: int) -> bytes:
    """Digits 0..levels-1, uint8 (n,), as ceil(n / per_byte) bytes: neighbours share a byte, so that
    entropy coding of bytes goes well below one bit per digit."""
    padded = torch.nn.functional.pad(digits, (0, -len(digits) % per_byte)).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed += padded[:, place] * levels**place
    return packed.cpu().numpy().tobytes()


def unpack(packed: bytes, out: Tensor, levels: int, per_byte: int) -> Tensor:
    """Returns the inverse of `pack`, each digit as the float32 digit - (levels - 1) / 2, into `out`, shape (n,), on the
    CPU.

    Raises:
        FrameError: there are not ceil(n / per_byte) bytes, or one is too large.
    """
    size, values = len(out), out.numpy()
    if len(packed) != -(-size // per_byte):
        raise FrameError(f"{len(packed)} bytes do not hold {size} digits")
    index = np.frombuffer(packed, np.uint8)
    if len(index) and index.max() >= levels**per_byte:
        raise FrameError(f"a byte of the frame is {index.max()}, the largest is {levels**per_byte - 1}")
    if per_byte == 1:  # an odd number of levels: whole numbers, which are subtracted while they are bytes
        np.copyto(values, (index - np.uint8(levels // 2)).view(np.int8))
        return out
    table, whole = _digits(levels, per_byte), size // per_byte
    end = whole * per_byte
    table.take(index[:whole], 0, out=values[:end].reshape(whole, per_byte), mode="clip")  # unbuffered
    values[end:] = table[index[whole:]].reshape(-1)[: size - end]
    return out


@cache
def _digits(levels: int, per_byte: int) -> NDArray[np.float32]:
    """Returns what each byte stands for, shape (levels^per_byte, per_byte)."""
    number = np.arange(levels**per_byte)
    places = [number // levels**place % levels for place in range(per_byte)]
    return np.stack(places, 1).astype(np.float32) - np.float32((levels - 1) / 2)


def to_gaps(positions: Tensor, size: int) -> Planes:
    """Returns ascending positions within 0..size-1 as three planes: how many each group of 256 has (low and high
    bytes), and for each position the gap to the one before it in its group."""
    group = positions // GROUP
    counts = torch.bincount(group, minlength=-(-size // GROUP))
    gaps = positions % GROUP
    follows = group[1:] == group[:-1]
    gaps[1:] -= torch.where(follows, gaps[:-1] + 1, 0)
    return [*bytes_of(counts.to(torch.int16), "<i2"), gaps.to(torch.uint8).cpu().numpy().tobytes()]


def from_gaps(planes: Planes, size: int) -> Tensor:
    """Returns the inverse of `to_gaps`, int64.

    Raises:
        FrameError: the planes do not stand for ascending positions within 0..size-1.
    """
    counts = numbers_of(planes[:2], -(-size // GROUP), "<i2").astype(np.int64)
    steps = np.frombuffer(planes[2], np.uint8).astype(np.int64) + 1
    if (counts < 0).any() or counts.sum() != len(steps):
        raise FrameError(f"{len(steps)} positions, but groups of {counts.sum()}")
    group = np.repeat(np.arange(len(counts)), counts)
    reached = np.concatenate([[0], np.cumsum(steps)])
    before = reached[np.concatenate([[0], np.cumsum(counts)])[:-1]]  # reached when each group begins
    inside = reached[1:] - before[group] - 1
    positions = group * GROUP + inside
    if len(positions) and (inside.max() >= GROUP or positions[-1] >= size):
        raise FrameError("a position of the frame is outside its group")
    return torch.from_numpy(positions)
