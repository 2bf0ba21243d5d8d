"""In which precision a network computes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch


@lru_cache
def _computes_in_bf16() -> bool:
    """Tells whether this processor is faster in bf16. Intel's without tiles are not, whatever instructions they have:
    measured, a convolutional U-Net trained at 0.7 times the speed of float32."""
    info = Path("/proc/cpuinfo")
    amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return bool(torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported()))


def in_bf16(precision: str, device: torch.device) -> bool:
    """Tells whether `train.precision` means bf16 there: `auto` does where the hardware computes in it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _computes_in_bf16()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Returns torch's autocast to bf16 where the precision means that."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device))
