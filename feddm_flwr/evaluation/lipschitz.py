"""Figures that show how a run behaves: gauges to read, not proofs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ITERATIONS = 8  # of the power method
_STEP = 1e-2  # of the finite differences, relative to the input's norm


def lipschitz(network: Any, x: Tensor, t: Tensor, labels: Tensor | None) -> float:
    """Returns an estimate, from below, of the denoiser's Lipschitz constant in x: the largest singular value of its
    Jacobian at the inputs x, (B, C, H, W), and time steps t, (B,), by the power method.

    The paper (FedDM, arXiv 2407.14730) assumes that the denoiser is Lipschitz. This says how steep it is where it was
    looked at, no more.
    """
    network.eval()
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        random = torch.Generator(x.device).manual_seed(0)
        v = _unit(torch.randn(x.shape, generator=random, device=x.device))
        step = _STEP * _norms(x).mean()
        largest = torch.zeros(len(x), device=x.device)
        with torch.no_grad():
            at_x = network(x, t, labels).sample
        for _ in range(_ITERATIONS):
            with torch.no_grad():
                u = (network(x + step * v, t, labels).sample - at_x) / step  # J v
            largest = torch.maximum(largest, _norms(u))
            inputs = x.clone().requires_grad_()
            (back,) = torch.autograd.grad(network(inputs, t, labels).sample, inputs, u)  # J^T J v
            v = _unit(back)
        return float(largest.max())
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms


def _unit(x: Tensor) -> Tensor:
    unit: Tensor = x / _norms(x).clamp(min=1e-12).view(-1, 1, 1, 1)
    return unit
