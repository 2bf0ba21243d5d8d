"""What machine a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def kind() -> str:
    """The name of its GPU or processor."""
    import torch  # takes seconds

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
