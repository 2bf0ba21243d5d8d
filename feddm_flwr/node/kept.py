"""What a process of a node keeps from one task to the next of the same run: the network, and the steps of its training
with what was recorded of them, which takes as long as a hundred steps of a small network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from feddm_flwr.compute.cuda_graph import release_memory
from feddm_flwr.config import RunConfig
from feddm_flwr.models import networks, parameters
from feddm_flwr.models.pretrained import Assets
from feddm_flwr.training.step import Step
from feddm_flwr.vector import Vector

_SHARE = 8  # one part in so many of a GPU's memory may be kept: other processes of the run need it meanwhile


@dataclass
class Bench:
    """A network on a device, the weights that it was built with, and its steps where it was trained already."""

    made_for: tuple[RunConfig, str, torch.device]
    network: nn.Module
    initial: Vector
    step: Step | None = None


_kept: list[Bench] = []


def take(config: RunConfig, wanted: str, assets: Assets, device: torch.device) -> Bench:
    """Returns what was kept of a run, given what it builds upon by name and as files, or builds it. It is the caller's
    alone, who puts it back if nothing went wrong."""
    made_for = config, wanted, device
    found, _kept[:] = _kept[:], []
    if found and found[0].made_for == made_for:
        return found[0]
    network = networks.build(config, assets)
    initial = parameters.to_vector(network)
    return Bench(made_for, network.to(device), initial)


def put_back(bench: Bench) -> None:
    """Keeps it for the next task, unless a GPU had too little left: then the memory is given back."""
    device = bench.made_for[2]
    if device.type == "cuda":
        release_memory()
        most = torch.cuda.get_device_properties(device).total_memory // _SHARE
        if torch.cuda.memory_reserved(device) > most:
            return
    _kept[:] = [bench]
