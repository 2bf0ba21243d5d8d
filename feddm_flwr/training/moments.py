"""What the optimizers of one round begin with of the rounds before, and leave for the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.exchange.extras import Extras, channels
from feddm_flwr.protocol.tasks import MOMENTS, MOMENTUM
from feddm_flwr.vector import Layout, Vector


class States(Protocol):
    """The optimizers, as far as is needed here."""

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns what is kept of a parameter, by the optimizer's names; it may be changed."""


class Memory(ABC):
    """First and second moments, and Muon's momentum, over the rounds."""

    def groups(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        """Returns AdamW's groups of parameters."""
        return [{"params": parameters}]

    def grouped_like(self, other: Memory) -> bool:
        """Tells whether another has the same groups."""
        return type(self) is type(other)

    @abstractmethod
    def begin(self, optimizers: States, parameters: list[Tensor]) -> None:
        """Gives optimizers that took no step, or whose state is 0, what there is to begin with, in place."""

    @abstractmethod
    def end(self, optimizers: States, parameters: list[Tensor]) -> Extras:
        """Returns what the next round is to begin with."""

    def correction(self, group: dict[str, Any], step: int) -> float:
        """Returns the factor of the learning rate of a group in a step, counted from 1."""
        return 1.0


@dataclass(frozen=True)
class Shared(Memory):
    """What the server averages: AdamW's second moments as a mean for each output channel, while first moments begin at
    0 (FedAdamW, arXiv 2510.27486), and Muon's momentum."""

    shared: Sequence[bool]  # by parameter: whether it is among them; others begin anew
    moments: Extras | None  # of those that are, one after the other; None where there are none yet
    steps: int  # that they come of

    def groups(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        goes_on = self.shared if self.moments is not None else [False] * len(parameters)
        parts = [[p for p, one in zip(parameters, goes_on, strict=True) if one == kind] for kind in (True, False)]
        return [{"params": part, "goes_on": kind} for part, kind in zip(parts, (True, False), strict=True) if part]

    def grouped_like(self, other: Memory) -> bool:
        return isinstance(other, Shared) and (self.moments is None) == (other.moments is None)

    def begin(self, optimizers: States, parameters: list[Tensor]) -> None:
        if self.moments is None:
            return
        none = np.zeros(0, np.float32)  # where all parameters are of the other kind
        means, place = torch.from_numpy(self.moments.get(MOMENTS, none)), 0
        momentum, start = torch.from_numpy(self.moments.get(MOMENTUM, none)), 0
        for p in self._those(parameters):
            if _is_muons(optimizers, p):
                own = momentum[start : (start := start + p.numel())]
                optimizers.state(p)["momentum"].copy_(own.view_as(p))
                continue
            size = channels(tuple(p.shape))
            mean = means[place : (place := place + size)].view([size, *[1] * (p.dim() - 1)] if p.dim() else [])
            second = torch.empty_like(p).copy_(mean.to(p.device).expand_as(p))
            _set(optimizers.state(p), self.steps, torch.zeros_like(p), second)

    def end(self, optimizers: States, parameters: list[Tensor]) -> Extras:
        means, momentum = [torch.zeros(0)], [torch.zeros(0)]
        for p in self._those(parameters):
            state = optimizers.state(p)
            if _is_muons(optimizers, p):
                momentum.append(state["momentum"].reshape(-1).float().cpu())
            else:
                second = state["exp_avg_sq"]
                means.append(second.reshape(channels(tuple(second.shape)), -1).mean(1).float().cpu())
        found = {MOMENTS: torch.cat(means).numpy(), MOMENTUM: torch.cat(momentum).numpy()}
        return {name: vector for name, vector in found.items() if name == MOMENTS or len(vector)}

    def correction(self, group: dict[str, Any], step: int) -> float:
        """Returns 1 where the group begins anew, and of Muon's. Elsewhere AdamW takes the first moments for as old as
        the second ones."""
        if not group.get("goes_on"):
            return 1.0
        beta = group["betas"][0]
        return float((1 - beta ** (self.steps + step)) / (1 - beta**step))

    def _those(self, parameters: list[Tensor]) -> list[Tensor]:
        return [p for p, shared in zip(parameters, self.shared, strict=True) if shared]


@dataclass(frozen=True)
class Kept(Memory):
    """All of them, of every parameter, as this node's last round left them."""

    values: Vector | None  # number of steps, first moments or momentum, second moments; None where there are none yet

    @staticmethod
    def layout(size: int) -> Layout:
        """Returns that of the values, for so many parameters."""
        return Layout(("steps", "first", "second"), ((1,), (size,), (size,)))

    def begin(self, optimizers: States, parameters: list[Tensor]) -> None:
        if self.values is None:
            return
        sizes = [p.numel() for p in parameters]
        steps, *moments = torch.from_numpy(self.values).split([1, sum(sizes), sum(sizes)])
        for p, first, second in zip(parameters, *(m.split(sizes) for m in moments), strict=True):
            if _is_muons(optimizers, p):
                optimizers.state(p)["momentum"].copy_(first.view_as(p))
            else:
                own = (torch.empty_like(p).copy_(m.view_as(p)) for m in (first, second))
                _set(optimizers.state(p), int(steps), *own)

    def end(self, optimizers: States, parameters: list[Tensor]) -> Extras:
        states = [optimizers.state(p) for p in parameters]
        steps = max((state["step"].item() for state in states if "step" in state), default=0)
        first = [state["momentum"] if "momentum" in state else state["exp_avg"] for state in states]
        second = [state.get("exp_avg_sq", torch.zeros_like(one)) for state, one in zip(states, first, strict=True)]
        flat = torch.cat([moment.reshape(-1).float() for moment in (*first, *second)]).cpu().numpy()
        return {MOMENTS: np.concatenate([[np.float32(steps)], flat])}


def _is_muons(optimizers: States, p: Tensor) -> bool:
    return "momentum" in optimizers.state(p)


def _set(state: dict[str, Tensor], steps: int, first: Tensor, second: Tensor) -> None:
    """Gives AdamW's state of a parameter these values, where it is, if there is one."""
    values = {"step": torch.tensor(float(steps), device=first.device), "exp_avg": first, "exp_avg_sq": second}
    for name, value in values.items():
        state.setdefault(name, value).copy_(value)
