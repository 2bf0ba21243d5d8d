"""What AdamW of one round begins with of the rounds before, and leaves for the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.exchange.moments import channels
from feddm_flwr.vector import Layout, Vector


class Moments(ABC):
    """First and second moments over the rounds."""

    def groups(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        """Returns AdamW's groups of parameters."""
        return [{"params": parameters}]

    @abstractmethod
    def begin(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        """Gives an AdamW that took no step what there is to begin with."""

    @abstractmethod
    def end(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Vector:
        """Returns what the next round is to begin with."""

    def correction(self, group: dict[str, Any], step: int) -> float:
        """Returns the factor of the learning rate of a group in a step, counted from 1."""
        return 1.0


@dataclass(frozen=True)
class ChannelMeans(Moments):
    """Second moments as a mean for each output channel; first moments begin at 0 (FedAdamW, arXiv 2510.27486)."""

    shared: Sequence[bool]  # by parameter: whether its moments are among them; others begin anew
    means: Vector | None  # of those that are, one after the other; None where there are none yet
    steps: int  # that they come of

    def groups(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        goes_on = self.shared if self.means is not None else [False] * len(parameters)
        parts = [[p for p, one in zip(parameters, goes_on, strict=True) if one == kind] for kind in (True, False)]
        return [{"params": part, "goes_on": kind} for part, kind in zip(parts, (True, False), strict=True) if part]

    def begin(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        if self.means is None:
            return
        means, place = torch.from_numpy(self.means), 0
        for p in (p for p, shared in zip(parameters, self.shared, strict=True) if shared):
            size = channels(tuple(p.shape))
            own = means[place : (place := place + size)].view([size, *[1] * (p.dim() - 1)] if p.dim() else [])
            second = torch.empty_like(p).copy_(own.to(p.device).expand_as(p))
            optimizer.state[p] = _state(p, self.steps, torch.zeros_like(p), second)

    def end(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Vector:
        shared = (p for p, shared in zip(parameters, self.shared, strict=True) if shared)
        squares = (optimizer.state[p]["exp_avg_sq"] for p in shared)
        means = torch.cat([v.reshape(channels(tuple(v.shape)), -1).mean(1) for v in squares])
        vector: Vector = means.float().cpu().numpy()
        return vector

    def correction(self, group: dict[str, Any], step: int) -> float:
        """Returns 1 where the group begins anew. Elsewhere AdamW takes the first moments for as old as the second
        ones."""
        beta = group["betas"][0]
        return (1 - beta ** (self.steps + step)) / (1 - beta**step) if group["goes_on"] else 1.0


@dataclass(frozen=True)
class Kept(Moments):
    """All of them, of every parameter, as this node's last round left them."""

    values: Vector | None  # number of steps, first moments, second moments; None where there are none yet

    @staticmethod
    def layout(size: int) -> Layout:
        """Returns that of the values, for so many parameters."""
        return Layout(("steps", "first", "second"), ((1,), (size,), (size,)))

    def begin(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        if self.values is None:
            return
        sizes = [p.numel() for p in parameters]
        steps, *moments = torch.from_numpy(self.values).split([1, sum(sizes), sum(sizes)])
        for p, first, second in zip(parameters, *(m.split(sizes) for m in moments), strict=True):
            own = (torch.empty_like(p).copy_(m.view_as(p)) for m in (first, second))
            optimizer.state[p] = _state(p, int(steps), *own)

    def end(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Vector:
        states = [optimizer.state[p] for p in parameters]
        moments = [state[key].reshape(-1).float() for key in ("exp_avg", "exp_avg_sq") for state in states]
        return np.concatenate([[np.float32(states[0]["step"].item())], torch.cat(moments).cpu().numpy()])


def _state(p: Tensor, steps: int, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return {"step": torch.tensor(float(steps), device=p.device), "exp_avg": first, "exp_avg_sq": second}
