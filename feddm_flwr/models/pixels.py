"""Pixels as networks see them, float32 in [-1, 1], and back."""

from __future__ import annotations

from torch import Tensor


def to_network(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels of any shape as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] as uint8 pixels; values beyond are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
