"""Terms of the local objective that are functions of the weights alone, added to the gradients of its loss.

Methods that keep a node's training near to something are terms of this kind: FedProx, FedDyn, SCAFFOLD.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from feddm_flwr.config.keys import Train
from feddm_flwr.models.parameters import split_like


class GradientTerm(ABC):
    """A term of the objective of one round at a node."""

    @abstractmethod
    def start(self, parameters: list[Tensor]) -> None:
        """Begins a round at a node, with the weights that it received in the parameters. Where this is not the first,
        what `add` reads must stay where it is: it may have been recorded."""

    @abstractmethod
    def add(self, parameters: list[Tensor]) -> None:
        """Adds the term's gradient to the gradients in the parameters, in place; on a GPU this is recorded, so it may
        neither wait for the GPU nor depend on values."""


class Proximal(GradientTerm):
    """mu/2 * ||w - w_t||^2, with w_t the received weights (Li et al. 2020, FedProx, eq. 2)."""

    def __init__(self, mu: float) -> None:
        """Weighs the distance with `mu`."""
        self._mu = mu
        self._received: list[Tensor] = []

    def start(self, parameters: list[Tensor]) -> None:
        self._received = self._received or [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self._received, [p.detach() for p in parameters])

    @torch.no_grad()
    def add(self, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        torch._foreach_add_(gradients, torch._foreach_sub(parameters, self._received), alpha=self._mu)


class Control(GradientTerm):
    """SCAFFOLD's correction c - c_k (Karimireddy et al. 2020, arXiv 1910.06378, eq. 3).

    The node's next c_k is the mean of its gradients over the round. With gradient descent at a constant rate, and
    nothing clipped, that is the paper's option II. Each is clipped by itself, before the correction.
    """

    def __init__(self, correction: Tensor, max_norm: float) -> None:
        """Adds the `correction`, flat, to all gradients; it may be changed before a start."""
        self.correction, self._most = correction, max_norm
        self._correction: list[Tensor] = []
        self._sums: list[Tensor] = []

    def start(self, parameters: list[Tensor]) -> None:
        self._correction = split_like(self.correction, parameters)
        self._sums = self._sums or [torch.zeros_like(p) for p in parameters]
        torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def add(self, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        clipped = torch._foreach_mul(gradients, (self._most / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_add_(self._sums, clipped)
        torch._foreach_add_(gradients, self._correction)

    def mean(self, steps: int) -> Tensor:
        """Returns the node's next control variate, flat, after so many steps."""
        return torch.cat([total.reshape(-1) for total in self._sums]) / steps


def gradient_terms(train: Train) -> list[GradientTerm]:
    """Returns the terms that a run's configuration asks for, none for most."""
    return [Proximal(train.mu)] if train.mu > 0 else []
