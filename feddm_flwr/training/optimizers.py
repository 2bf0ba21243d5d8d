"""The optimizers of a node's steps, behind one face: one of all parameters, or Muon of the matrices and AdamW of the
rest."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from feddm_flwr.config.keys import Train
from feddm_flwr.exchange.extras import has_momentum
from feddm_flwr.training.moments import Memory
from feddm_flwr.training.muon import Muon


class Optimizers:
    """Every parameter belongs to one of them."""

    def __init__(self, t: Train, parameters: list[Tensor], memory: Memory | None, records: bool) -> None:
        """Begins with what is in the `memory`, or anew. Where steps are to be recorded as a CUDA graph, the learning
        rate lies in the GPU's memory."""
        self._memory, self._records, self._taken = memory, records, 0
        matrices = [p for p in parameters if t.optimizer == "muon" and has_momentum(tuple(p.shape))]
        groups = _without(memory.groups(parameters) if memory else [{"params": parameters}], matrices)
        self._all = [_usual(t, groups, records)] if groups else []
        if matrices:
            rate = _rate(t, matrices[0], records)
            self._all.append(Muon([{"params": matrices}], rate, weight_decay=t.weight_decay))
        self._states = {p: one.state for one in self._all for group in one.param_groups for p in group["params"]}
        self._parameters, self._quantized = parameters, t.optimizer == "adamw8bit"  # whose tables are not to be 0
        if memory:
            memory.begin(self, parameters)

    def fit(self, memory: Memory | None) -> bool:
        """Tells whether they can begin again with that."""
        if self._quantized:
            return False
        if memory is None or self._memory is None:
            return memory is self._memory
        return memory.grouped_like(self._memory)

    def begin_again(self, memory: Memory | None) -> None:
        """Begins as new ones would; what is kept of a parameter stays where it is."""
        self._memory, self._taken = memory, 0
        for p in self._parameters:
            for kept in self.state(p).values():
                kept.zero_()
        if memory:
            memory.begin(self, self._parameters)

    def set_rate(self, rate: float) -> None:
        """Begins a step with this learning rate."""
        self._taken += 1
        for group in (group for one in self._all for group in one.param_groups):
            own = rate * (self._memory.correction(group, self._taken) if self._memory else 1.0)
            if self._records:
                group["lr"].fill_(own)  # a graph reads it from the GPU's memory
            else:
                group["lr"] = own

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns what is kept of a parameter, by the optimizer's names; it may be changed."""
        found: dict[str, Tensor] = self._states[parameter][parameter]
        return found

    def step(self) -> None:
        """Changes the parameters by their gradients."""
        for one in self._all:
            one.step()

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        for one in self._all:
            one.zero_grad(set_to_none=True)


def _without(groups: list[dict[str, Any]], matrices: list[Tensor]) -> list[dict[str, Any]]:
    """Returns groups without Muon's parameters."""
    theirs = {id(p) for p in matrices}
    found = [{**group, "params": [p for p in group["params"] if id(p) not in theirs]} for group in groups]
    return [group for group in found if group["params"]]


def _rate(t: Train, parameter: Tensor, records: bool) -> float | Tensor:
    return torch.tensor(t.learning_rate, device=parameter.device) if records else t.learning_rate


def _usual(t: Train, groups: list[dict[str, Any]], records: bool) -> torch.optim.Optimizer:
    if t.optimizer == "adamw8bit":
        import bitsandbytes

        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            groups, t.learning_rate, weight_decay=t.weight_decay
        )
        return eight_bit
    if t.optimizer == "sgd":
        return torch.optim.SGD(groups, t.learning_rate, weight_decay=t.weight_decay)
    if records:
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # the first is not
        for group in groups:
            group["lr"] = _rate(t, group["params"][0], records)
    return torch.optim.AdamW(groups, t.learning_rate, weight_decay=t.weight_decay, fused=True, capturable=records)
