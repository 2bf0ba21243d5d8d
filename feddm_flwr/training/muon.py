"""Muon: steps along the momentum made orthogonal, for weights that are matrices (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values of 0.01 and more come to about 1 in five iterations
_ITERATIONS = 5
_LEAST_NORM = 1e-7
#: AdamW's steps are about this long in each weight, as a share of its learning rate (Liu et al. 2025, "Muon is
#: scalable for LLM training", section 2.2), so its learning rate fits.
_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum of the gradients, orthogonalized; a convolution is the matrix of output channels x rest."""

    def __init__(self, groups: Iterable[Any], lr: float | Tensor, momentum: float = 0.95, weight_decay: float = 0.0):
        """Takes matrices alone; a learning rate that is a tensor is read when a recorded step is replayed."""
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step by the gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            held: list[Tensor] = [self.state[p]["momentum"] for p in parameters]
            gradients: list[Tensor] = [p.grad for p in parameters]
            torch._foreach_lerp_(held, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, held, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            # Matrices of a shape are one batch: a U-Net has many, all small.
            batches = defaultdict[tuple[int, int], list[int]](list)
            for i, p in enumerate(parameters):
                batches[len(p), p.numel() // len(p)].append(i)
            for shape, some in batches.items():
                update = orthogonal(torch.stack([ahead[i].reshape(shape) for i in some]))
                update *= -_RMS * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_add_(
                    [parameters[i] for i in some],
                    [u.view_as(parameters[i]) for u, i in zip(update, some, strict=True)],
                )


def orthogonal(matrices: Tensor) -> Tensor:
    """Returns matrices (N, out, in) with singular values of about 1 (0.7 to 1.2) where they were above a hundredth of
    the norm, and the same singular vectors, by Newton-Schulz iterations; bfloat16 on a GPU."""
    a, b, c = _QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
