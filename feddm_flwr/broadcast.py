"""The server's end of the downlink: what every node gets, given what it holds already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddm_flwr.config import RunConfig, derive_seed
from feddm_flwr.exchange import Values, channel, exact, fingerprint


class Broadcast:
    """Tells the nodes the weights of each round, coded.

    Under `codec.target = delta` the nodes hold the *shadow*, the same bits everywhere: the initial
    weights plus every difference sent so far. The server sends `model - shadow`, coded, and adds what
    it decodes to the shadow as they do. What the coding loses is in the next difference by itself: it
    *is* the residual, and a second one on top diverges.
    """

    def __init__(self, config: RunConfig, initial: Values, layout: str) -> None:
        c = config.codec
        self._seed = config.seed
        self._down = channel(c.downlink, c, layout, len(initial))
        self._whole = exact(layout, len(initial))
        self._shadow = initial if c.shadow else None
        self._frames: dict[int, bytes] = {}  # the newest, by the version that they lead to
        self._full = b""
        self.version = 0
        self.fingerprint = ""

    def state(self) -> dict[str, NDArray[Any]]:
        """What a broadcast must be given to go on where this one is."""
        if self._shadow is None:
            return {}
        return {"shadow": self._shadow} | {str(n): np.frombuffer(f, np.uint8) for n, f in self._frames.items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `state`."""
        if self._shadow is not None:
            self._shadow = state["shadow"]
            self._frames = {int(n): frame.tobytes() for n, frame in state.items() if n != "shadow"}

    def prepare(self, weights: Values, number: int) -> Values:
        """Code the weights for round `number`; returns what the nodes will have decoded.

        Raises:
            ValueError: the weights cannot be coded.
        """
        seed = derive_seed(self._seed, "downlink", number)
        self.version, self._full = number, b""
        if self._shadow is None:
            frame, received = self._down.code(weights, "weights", number, seed)
            self._frames = {number: frame}
            return received
        frame, shadow = self._down.code(weights - self._shadow, "delta", number, seed)
        shadow += self._shadow
        self._shadow = shadow
        self.fingerprint = fingerprint(self._shadow)
        self._frames[number] = frame
        while sum(map(len, self._frames.values())) > 4 * len(weights):  # the whole shadow is smaller
            del self._frames[min(self._frames)]
        return self._shadow

    def frames(self, held: int | None) -> dict[str, bytes]:
        """What a node needs that holds a version (0: the initial weights; None: nothing that is of use):
        the frames that it missed, or the whole shadow where that is smaller."""
        if self._shadow is None:
            return {f"frame-{self.version}": self._frames[self.version]}
        if held is not None:
            missed = range(held + 1, self.version + 1) or [self.version]
            if all(number in self._frames for number in missed):
                frames = {f"frame-{number}": self._frames[number] for number in missed}
                if len(missed) == 1 or sum(map(len, frames.values())) < len(self._whole_shadow()):
                    return frames
        return {"shadow": self._whole_shadow()}

    def _whole_shadow(self) -> bytes:
        """The frame of the whole shadow, made where a node needs it."""
        assert self._shadow is not None
        self._full = self._full or self._whole.encode(self._shadow, "shadow", self.version)
        return self._full
