"""What the round asks of a rule by which the updates of the nodes become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeAlias

from feddm_flwr.config.plugins import load_class
from feddm_flwr.vector import Vector

#: Yields the update in a coded reply, one chunk after the other.
Decode: TypeAlias = Callable[[memoryview], Iterator[Vector]]


class Aggregator(ABC):
    """The running aggregate of the updates of a round; it must not depend on the order in which they come."""

    @classmethod
    def make(cls, size: int, decode: Decode, folder: Path) -> Self:
        """Makes one of vectors of `size` values, for extensions: by default `cls(size)`. A rule that needs all of them
        at a time keeps their frames in a file in `folder`, and decodes these with `decode`, instead of holding every
        vector in memory."""
        return cls(size)  # type: ignore[call-arg]

    @property
    @abstractmethod
    def count(self) -> int:
        """Returns how many vectors were added."""

    def check(self, vector: Vector) -> None:
        """Raises a ValueError where `add` would, so that all of a reply is added or nothing; by default never."""
        return

    @abstractmethod
    def add(self, vector: Vector, weight: int, frame: bytes, scale: float) -> None:
        """Adds a node's update, which weighs as many as its images, and the frame that holds it before it was scaled.

        Raises:
            ValueError: it cannot be added; nothing was then.
        """

    @abstractmethod
    def mean(self) -> Vector:
        """Returns the result, once, as float32; zeros where nothing was added."""


def aggregator_class(name: str) -> type[Aggregator]:
    """Returns the extension of that name.

    Raises:
        ConfigError: it is no aggregator.
    """
    return load_class("server.aggregation", name, Aggregator)  # type: ignore[type-abstract]
