"""In which precision a network computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
def autocast(precision: str, device: torch.device, norms: bool = True) -> Iterator[None]:
    """torch's autocast to bf16 where the precision means that; then, on a GPU, the `norms` are done in bf16 too, where
    torch would give the output of GroupNorm, which there is much of in a U-Net, in float32."""
    enabled = in_bf16(precision, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cuda" and norms:
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
        if function is nn.functional.group_norm:
            return _group_norm(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
