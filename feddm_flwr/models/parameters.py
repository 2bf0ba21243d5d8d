"""A network's parameters as one flat vector. What is frozen is not among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from feddm_flwr.vector import Layout, Vector


def layout(model: torch.nn.Module) -> Layout:
    """Returns the layout of the model's parameters.

    Raises:
        ValueError: the model has floating-point buffers, which the exchange would lose.
    """
    buffers = [name for name, b in model.named_buffers() if b.is_floating_point()]
    if buffers:
        raise ValueError(f"buffers {buffers} would not be exchanged: use a model without them")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns the parameters that are trained, in the order of the layout."""
    return [p for p in model.parameters() if p.requires_grad]


def to_vector(model: torch.nn.Module) -> Vector:
    """Returns the parameters as one float32 vector on the CPU, shape (layout.size,)."""
    result: Vector = flat(model).cpu().numpy()
    return result


def flat(model: torch.nn.Module) -> torch.Tensor:
    """Returns the parameters as one float32 vector where they are, shape (layout.size,)."""
    return torch.cat([p.detach().reshape(-1).float() for p in trainable(model)])


def split_like(vector: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the parts of a flat vector that belong to parameters, in their shapes."""
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def load_vector(model: torch.nn.Module, vector: Vector) -> None:
    """Writes a flat vector into the parameters, in place.

    Raises:
        ValueError: the vector has another length than the model.
    """
    parameters = trainable(model)
    size = sum(p.numel() for p in parameters)
    if vector.shape != (size,):
        raise ValueError(f"the model has {size} parameters, the vector has shape {vector.shape}")
    values = torch.from_numpy(np.ascontiguousarray(vector))
    with torch.no_grad():
        for p, part in zip(parameters, split_like(values, parameters), strict=True):
            p.copy_(part)
