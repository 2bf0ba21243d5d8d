"""A codec: 8-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from feddm_flwr.codecs.base import LARGEST, Codec, Planes, State, largest_of
from feddm_flwr.codecs.framing import FrameError
from feddm_flwr.codecs.packing import from_bfloat16, numbers_of, to_bfloat16

_TOP = 448.0  # the largest number of e4m3


@dataclass(frozen=True)
class Float8(Codec):
    """`fp8`: e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), in units that put the vector's largest value at the top
    of its range."""

    name: ClassVar[str] = "fp8"

    def init(self, vector: Tensor, seed: int) -> State:
        step = max(largest_of(vector), 1e-30) / _TOP * 1.01  # above it, so that rounding clips nothing
        return torch.tensor([step]).bfloat16().float()

    def encode(self, values: Tensor, state: State) -> Planes:
        assert isinstance(state, Tensor)
        codes = (values / state.to(values.device)).to(torch.float8_e4m3fn).view(torch.uint8)
        return [codes.cpu().numpy().tobytes(), *to_bfloat16(state)]

    def decode(self, planes: Planes, out: Tensor) -> None:
        codes = torch.from_numpy(numbers_of(planes[:1], len(out), "u1").copy()).view(torch.float8_e4m3fn).float()
        if not bool(codes.isfinite().all()):
            raise FrameError("the frame has values that are not finite")
        torch.mul(codes, from_bfloat16(planes[1:], 1, LARGEST), out=out)

    def limits(self, size: int) -> list[int]:
        return [size, 1, 1]
