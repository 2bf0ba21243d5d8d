"""Lines of a run's log that say how far it is: the server writes them, and `feddm run` reads them.

Format and parser of each are here. A node's text in a log cannot pass for one of these: it stands behind other words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What every line of the server's begins with on its standard output.
MARK = "feddm: "


@dataclass(frozen=True)
class RoundBegun:
    """The nodes of a round are asked."""

    round: int
    rounds: int
    asked: int

    def __str__(self) -> str:
        return f"round={self.round}/{self.rounds} asked={self.asked}"


@dataclass(frozen=True)
class NodeDone:
    """A node's reply is in."""

    round: int
    node: str
    done: int  # good replies so far
    loss: float
    up: int  # bytes

    def __str__(self) -> str:
        return f"round={self.round} node={self.node} done={self.done} loss={self.loss:.4f} up={self.up}"


@dataclass(frozen=True)
class RoundDone:
    """A round is over."""

    round: int
    rounds: int
    loss: float
    eval: float
    ok: int
    failed: int
    up: int  # bytes
    down: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"round={self.round}/{self.rounds} loss={self.loss:.4f} eval={self.eval:.4f} ok={self.ok} "
            f"failed={self.failed} up={self.up} down={self.down} seconds={self.seconds:.1f}"
        )


@dataclass(frozen=True)
class Sampling:
    """Samples are drawn for a grid."""

    round: int
    count: int
    steps: int
    weights: str

    def __str__(self) -> str:
        return f"round={self.round} sampling={self.count} steps={self.steps} weights={self.weights}"


Progress = RoundBegun | NodeDone | RoundDone | Sampling

_PATTERNS: dict[type[Progress], str] = {
    RoundBegun: r"round=(\d+)/(\d+) asked=(\d+)",
    NodeDone: r"round=(\d+) node=(\S+) done=(\d+) loss=(\S+) up=(\d+)",
    RoundDone: r"round=(\d+)/(\d+) loss=(\S+) eval=(\S+) ok=(\d+) failed=(\d+) up=(\d+) down=(\d+) seconds=(\S+)",
    Sampling: r"round=(\d+) sampling=(\d+) steps=(\d+) weights=(\S+)",
}
_READERS = {"int": int, "float": float, "str": str}


def parse(text: str) -> Progress | None:
    """Returns what a line says of a run's progress, without its mark; None where it says something else."""
    for kind, pattern in _PATTERNS.items():
        if found := re.fullmatch(pattern, text):
            types = kind.__annotations__.values()
            try:
                return kind(*(_READERS[of](value) for of, value in zip(types, found.groups(), strict=True)))
            except ValueError:  # a figure that is none
                return None
    return None
