"""Averages of the global weights over the rounds, which are evaluated and shipped instead of the last ones.

How wide an average should be is known at the end alone (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3), so two
are kept, and the last weights may win, too. A width is that of EDM2: the standard deviation of the weighting function
as a share of the training so far. (EDM2 puts other widths together from averages of several times; from those of one
time alone, that was wrong by a factor of two.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from feddm_flwr.vector import PIECE, Vector

#: What is tried at the end; 0 stands for the last weights alone.
WIDTHS = (0.0, 0.05, 0.1)
#: What is evaluated before that, and shipped where nothing says which is best.
USUAL_WIDTH = 0.1


class Average(ABC):
    """An average of the weights of all rounds so far."""

    width: float | None = None  # the one that `value` has, where there is more than one

    @abstractmethod
    def update(self, weights: Vector, before: int, steps: int) -> None:
        """Takes in the weights after a round of so many local steps, with so many steps before it."""

    @abstractmethod
    def value(self, weights: Vector) -> Vector:
        """Returns the average; `weights` are those of the last round."""

    @abstractmethod
    def tensors(self) -> dict[str, Vector]:
        """Returns what a checkpoint has of it; later updates change these."""


class Exponential(Average):
    """Decays by a factor in each local step."""

    def __init__(self, decay: float, value: Vector) -> None:
        self._decay, self._value = decay, value

    def update(self, weights: Vector, before: int, steps: int) -> None:
        mix(self._value, weights, ema_factor(self._decay, before, steps))

    def value(self, weights: Vector) -> Vector:
        return self._value

    def tensors(self) -> dict[str, Vector]:
        return {"ema": self._value}


class PowerFunctions(Average):
    """One for each width above 0, which weighs step t by t^gamma (EDM2, eq. 3)."""

    def __init__(self, values: dict[float, Vector]) -> None:
        self._values, self.width = values, USUAL_WIDTH

    def update(self, weights: Vector, before: int, steps: int) -> None:
        for width, value in self._values.items():
            mix(value, weights, float((before / (before + steps)) ** (exponent(width) + 1)))

    def value(self, weights: Vector) -> Vector:
        return self._values[self.width] if self.width else weights

    def tensors(self) -> dict[str, Vector]:
        return {f"ema.{width:g}": value for width, value in self._values.items()}


def average(kind: str, decay: float, initial: Vector) -> Average:
    """Returns the average of a run that begins with these weights, by `server.average`."""
    if kind == "exponential":
        return Exponential(decay, initial.copy())
    return PowerFunctions({width: initial.copy() for width in WIDTHS if width})


def restored(tensors: Mapping[str, Any], decay: float) -> Average:
    """Returns that of a checkpoint, of its kind: older ones have an exponential one."""
    if "ema" in tensors:
        return Exponential(decay, tensors["ema"].copy())
    return PowerFunctions({width: tensors[f"ema.{width:g}"].copy() for width in WIDTHS if width})


def exponent(width: float) -> float:
    """Returns the gamma of a width: width^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1 (EDM2, eq. 4)."""
    inverse = 1 / width**2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def ema_factor(decay: float, steps_before: int, steps: int) -> float:
    """Returns what remains of an exponential average in a round of `steps` local steps after `steps_before` others:
    min(decay, (1 + s) / (10 + s))^H. A decay per round would ship the initial noise of a short run."""
    return float(min(decay, (1 + steps_before) / (10 + steps_before)) ** steps)


def mix(value: Vector, weights: Vector, factor: float) -> None:
    """Makes `value`, in place, into factor * value + (1 - factor) * weights."""
    for start in range(0, len(value), PIECE):
        piece = slice(start, start + PIECE)
        value[piece] *= np.float32(factor)
        value[piece] += np.float32(1 - factor) * weights[piece]
