"""Terms of the local objective that are functions of the weights alone, added to the gradients of its loss.

Methods that keep a node's training near to something are terms of this kind: FedProx, FedDyn, SCAFFOLD.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from feddm_flwr.config.keys import Train


class GradientTerm(ABC):
    """A term of the objective of one round at a node."""

    @abstractmethod
    def start(self, parameters: list[Tensor]) -> None:
        """Begins a round at a node, with the weights that it received in the parameters."""

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
        self._received = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def add(self, parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        torch._foreach_add_(gradients, torch._foreach_sub(parameters, self._received), alpha=self._mu)


def gradient_terms(train: Train) -> list[GradientTerm]:
    """Returns the terms that a run's configuration asks for, none for most."""
    return [Proximal(train.mu)] if train.mu > 0 else []
