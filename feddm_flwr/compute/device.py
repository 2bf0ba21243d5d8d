"""The device that a process trains on, and what is set before it does."""

from __future__ import annotations

import os
import sys

import torch

from feddm_flwr.config.keys import Train

#: torch's own choice: the cores that this process may use.
_CORES = torch.get_num_threads()


def prepare_process(train: Train) -> torch.device:
    """Fixes thread count and determinism before any work; returns the device to train on.

    Thread counts change the order of sums and so the bits of a result.
    """
    ray = sys.modules.get("ray")
    simulated = ray is not None and ray.is_initialized()
    torch.set_num_threads(train.threads or (1 if simulated else _CORES))
    # Read once by a process, which may do another run later that asks for it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if ray is not None and simulated and torch.cuda.is_available():
        # Ray's shares of a GPU are bookkeeping: without this, one node could take the memory of all.
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    torch.use_deterministic_algorithms(train.deterministic)  # set or reset: the process may have served others
    return usual_device()


def usual_device() -> torch.device:
    """Returns the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
