"""What AdamW of one round begins with of the rounds before: second moments, as a mean for each output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feddm_flwr.exchange.moments import channels
from feddm_flwr.vector import Vector


@dataclass(frozen=True)
class Moments:
    """Second moments that are shared, and how many steps they come of."""

    shared: Sequence[bool]  # by parameter: whether its moments are among them
    means: Vector | None  # of those that are, one after the other; None where there are none yet
    steps: int


def begin(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], moments: Moments) -> None:
    """Gives an AdamW that took no step the second moments of the shared parameters, where there are some, and their
    number of steps; its first moments are 0."""
    if moments.means is None:
        return
    means, place = torch.from_numpy(moments.means), 0
    for p, shared in zip(parameters, moments.shared, strict=True):
        if not shared:
            continue
        size = channels(tuple(p.shape))
        own = means[place : (place := place + size)].view([size, *[1] * (p.dim() - 1)] if p.dim() else [])
        optimizer.state[p] = {
            "step": torch.tensor(float(moments.steps), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.empty_like(p).copy_(own.to(p.device).expand_as(p)),
        }


def end(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], moments: Moments) -> Vector:
    """Returns the means of the second moments of the shared parameters, after some steps."""
    shared = (p for p, shared in zip(parameters, moments.shared, strict=True) if shared)
    squares = (optimizer.state[p]["exp_avg_sq"] for p in shared)
    means = torch.cat([v.reshape(channels(tuple(v.shape)), -1).mean(1) for v in squares])
    vector: Vector = means.float().cpu().numpy()
    return vector
