"""What machine a figure was measured on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path


def facts(cores: int | None = None) -> dict[str, str]:
    """The date, and the machine: its GPU or processor, and its cores or those that were used."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "device": f"{kind()}, cores: {cores or os.cpu_count()}"}


def kind() -> str:
    """The name of its GPU or processor."""
    import torch  # takes seconds

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # Some virtual machines call all generations of a processor the same.
    wide = " with AVX-512" if any(line.startswith("flags") and "avx512f" in line for line in lines) else ""
    return names[0] + wide if names else platform.processor() or platform.machine()
