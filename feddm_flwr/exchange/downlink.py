"""From the server to the nodes: what every node gets, given what it holds, and what the node makes of it.

Under `codec.target = delta` the nodes hold the *shadow*, the same bits everywhere: the initial weights plus every
difference sent so far. The server sends `model - shadow`, coded, and adds what it decodes to the shadow as they do.
What the coding loses is in the next difference by itself: it *is* the residual, and a second one on top diverges.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddm_flwr.config import RunConfig, derive_seed
from feddm_flwr.exchange.channel import FrameError, channel, exact, fingerprint
from feddm_flwr.exchange.node_state import NodeState, StateLostError
from feddm_flwr.exchange.partial import Split
from feddm_flwr.protocol.tasks import SHADOW, Frames, TrainTask, coded_frames, coded_name
from feddm_flwr.vector import Vector

log = logging.getLogger(__name__)


class DownlinkSender:
    """The server's end: it tells the nodes the weights of each round, coded."""

    def __init__(self, config: RunConfig, initial: Vector, layout: str) -> None:
        """Begins with the `initial` weights, which the nodes have; `layout` is its fingerprint."""
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
        """Returns what another must be given to go on where this one is."""
        if self._shadow is None:
            return {}
        return {SHADOW: self._shadow} | {str(n): np.frombuffer(f, np.uint8) for n, f in self._frames.items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Goes on from a `state`."""
        if self._shadow is not None:
            self._shadow = state[SHADOW]
            self._frames = {int(n): frame.tobytes() for n, frame in state.items() if n != SHADOW}

    def prepare(self, weights: Vector, number: int) -> Vector:
        """Codes the weights for round `number`; returns what the nodes will have decoded.

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
        """Returns what a node needs that holds a version (0: the initial weights; None: nothing that is of use):
        the frames that it missed, or the whole shadow where that is smaller."""
        if self._shadow is None:
            return {coded_name(self.version): self._frames[self.version]}
        if held is not None:
            missed = range(held + 1, self.version + 1) or [self.version]
            if all(number in self._frames for number in missed):
                frames = {coded_name(number): self._frames[number] for number in missed}
                if len(missed) == 1 or sum(map(len, frames.values())) < len(self._whole_shadow()):
                    return frames
        return {SHADOW: self._whole_shadow()}

    def _whole_shadow(self) -> bytes:
        """Returns the frame of the whole shadow, made where a node needs it."""
        assert self._shadow is not None
        self._full = self._full or self._whole.encode(self._shadow, SHADOW, self.version)
        return self._full


class DownlinkReceiver:
    """A node's end in one round: the weights that it is to train from."""

    def __init__(self, config: RunConfig, split: Split, task: TrainTask, state: NodeState | None) -> None:
        """Takes the node's `state` where it keeps some."""
        layout = split.shared.layout
        self._codec, self._split, self._task, self._state = config.codec, split, task, state
        self._down = channel(self._codec.downlink, self._codec, layout.fingerprint, layout.size)
        self._whole = exact(layout.fingerprint, layout.size)

    def receive(self, frames: Frames, initial: Vector) -> Vector:
        """Returns the weights to train from, given the frames of a message and the `initial` weights.

        Raises:
            FrameError: a frame is corrupt.
            StateLostError: the frames add to what this node does not hold.
        """
        shared, personal, number = self._split.shared, self._split.personal, self._task.round
        if self._codec.shadow:
            values = self._receive_shadow(frames, shared.take(initial))
        else:
            values = self._down.decode(frames[coded_name(number)], "weights", number)
        vector = initial.copy()
        shared.put(values, vector)
        if personal.layout.names:
            assert self._state
            kept = self._state.recall("personal", self._task.acked_any, personal.layout)
            if kept is not None:
                personal.put(kept, vector)
        return vector

    def _receive_shadow(self, frames: Frames, initial: Vector) -> Vector:
        """Returns the shadow of this round: the whole of it where that was sent, or what this machine has, or the
        `initial` weights (version 0), plus the frames since.

        Raises:
            FrameError: a frame is corrupt.
            StateLostError: neither is here what the frames add to, nor do they begin at version 0.
        """
        assert self._state
        version, wanted = self._task.round, self._task.shadow
        if (whole := frames.get(SHADOW)) is not None:
            vector = self._whole.decode(whole, SHADOW, version)
            if fingerprint(vector) != wanted:
                raise FrameError("the whole shadow has another fingerprint than the server says")
            self._state.write_shadow(version, wanted, vector, self._whole)
            return vector
        steps = coded_frames(frames)
        first = min(steps) - 1
        for held, start in self._held(first, version, initial):
            vector = start.copy()
            for number in range(held + 1, version + 1):
                vector += self._down.decode(steps[number], "delta", number)
            if fingerprint(vector) == wanted:
                if held != version:
                    self._state.write_shadow(version, wanted, vector, self._whole)
                return vector
            log.warning("%s: the shadow made from version %d is not the server's", self._state.owner, held)
        raise StateLostError(f"no shadow of version {first} to {version}")

    def _held(self, first: int, last: int, initial: Vector) -> Iterator[tuple[int, Vector]]:
        """Yields what is here of versions first..last, the newest first, and at last the initial weights."""
        assert self._state
        yield from self._state.shadows(self._whole, first, last)
        if first == 0:
            yield 0, initial
