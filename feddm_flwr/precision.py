"""In which precision a network computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@lru_cache
def _computes_in_bf16() -> bool:
    """Whether this processor is faster in bf16. Intel's without tiles are not, whatever instructions they have:
    measured, a convolutional U-Net trained at 0.7 times the speed of float32."""
    info = Path("/proc/cpuinfo")
    amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return bool(torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported()))


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether `train.precision` means bf16 there: `auto` does where the hardware computes in it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _computes_in_bf16()


@contextmanager
def autocast(precision: str, device: torch.device, compiled: bool = False) -> Iterator[None]:
    """torch's autocast to bf16 where the precision means that; then, on a GPU, GroupNorm is done in bf16 too, unless
    the network is compiled: torch would give its output, the largest there is in a U-Net, in float32."""
    enabled = in_bf16(precision, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cuda" and not compiled:
            with _NormsInBf16():
                yield
        else:
            yield


class _NormsInBf16(TorchFunctionMode):
    """Keeps autocast away from GroupNorm, whose means and variances are summed in float32 all the same."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not nn.functional.group_norm:
            return function(*args, **kwargs or {})
        x, groups, weight, bias, eps = args
        with torch.autocast(x.device.type, enabled=False):
            return function(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
