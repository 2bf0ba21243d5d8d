"""A node's end of the exchange: the downlink's receiver and the uplink's sender, with their state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.config import RunConfig, derive_seed
from feddm_flwr.exchange import Values, channel
from feddm_flwr.model import Layout
from feddm_flwr.node_state import NodeState, StateLostError, log


@dataclass(frozen=True)
class Task:
    """What the server says of a round; the fields are the keys of its message."""

    run_uuid: str
    round: int
    steps_before: int  # local steps in all earlier rounds
    evaluate: bool  # whether the held-out loss is asked for
    acked: int  # the last round whose reply of this node entered a mean; 0: none
    shadow: str  # fingerprint of what the nodes are to hold; empty where weights are sent


@dataclass(frozen=True)
class Sent:
    """A node's coded reply."""

    frame: bytes
    error: float  # norm of what the coding lost over that of what was to be sent
    residual_lost: bool  # what earlier rounds had left to be sent was gone


class NodeLink:
    """The exchange of one node in one round."""

    def __init__(self, config: RunConfig, layout: Layout, name: str, root: Path, task: Task) -> None:
        c = config.codec
        self._codec, self._task, self._layout = c, task, layout.fingerprint
        self._down = channel(c.downlink, c, self._layout, layout.size)
        self._up = channel(c.uplink, c, self._layout, layout.size)
        self._seed = derive_seed(config.seed, name, task.round, "uplink")
        self._state = NodeState(root, task.run_uuid, name) if c.shadow or c.error_feedback else None

    def receive(self, frames: Mapping[str, bytes], initial: Values) -> Values:
        """The weights to train from, given the frames of a message and the `initial` weights.

        Raises:
            FrameError: a frame is corrupt.
            StateLostError: the frames add to what this node does not hold.
        """
        number = self._task.round
        if not self._codec.shadow:
            return self._down.decode(frames[f"frame-{number}"], "weights", number)
        assert self._state
        whole = frames.get("shadow")
        steps = {int(name.removeprefix("frame-")): frame for name, frame in frames.items() if name != "shadow"}
        return self._state.shadow(number, self._task.shadow, steps, whole, self._down, initial)

    def send(self, trained: Tensor, received: Values) -> Sent:
        """Code the trained weights (layout.size,), or what training changed, as the target says.

        Error feedback: what one round's coding loses a later round sends (Seide et al. 2014;
        Karimireddy et al. 2019, algorithm 1); a decay below 1 forgets what has grown stale.
        """
        c, number, lost = self._codec, self._task.round, False
        wanted = trained
        if c.target == "delta":
            wanted = trained - torch.from_numpy(received).to(trained.device)
        if c.error_feedback and self._task.acked:
            assert self._state
            try:
                residual = self._state.read("residual", self._task.acked, self._layout, len(received))
                wanted = wanted + c.residual_decay * torch.from_numpy(residual).to(wanted.device)
            except StateLostError as error:
                log.warning("%s; error feedback begins anew", error)
                lost = True
        frame = self._up.encode(wanted, c.target, number, self._seed)
        meant = wanted.cpu().numpy()
        left: Values = meant - self._up.decode(frame, c.target, number)
        if c.error_feedback:
            assert self._state
            self._state.write("residual", number, left, self._layout, keep_from=self._task.acked)
        norm = float(np.linalg.norm(meant.astype(np.float64)))
        return Sent(frame, float(np.linalg.norm(left.astype(np.float64))) / norm if norm else 0.0, lost)
