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
from feddm_flwr.node_state import NodeState, StateLostError, log
from feddm_flwr.parts import ALL, Part, Parts


@dataclass(frozen=True)
class Task:
    """What the server says of a round; the fields are the keys of its message."""

    run_uuid: str
    round: int
    steps_before: int  # local steps in all earlier rounds
    evaluate: bool  # whether the held-out loss is asked for
    part: str  # which parameters the reply is to cover
    acked: int  # the last round whose reply of this node, of that part, entered a mean; 0: none
    acked_any: int  # the same of any part
    durable: int  # `acked`, had the server to go back to the last checkpoint that is on its disk for sure
    durable_any: int  # the same of any part
    assets: str  # JSON: SHA-256 of what the run builds upon, by kind
    shadow: str  # fingerprint of what the nodes are to hold; empty where weights are sent


@dataclass(frozen=True)
class Sent:
    """A node's coded reply."""

    frame: bytes
    error: float  # norm of what the coding lost over that of what was to be sent


class NodeLink:
    """The exchange of one node in one round."""

    def __init__(self, config: RunConfig, parts: Parts, name: str, root: Path, task: Task) -> None:
        c = config.codec
        self._codec, self._task, self._parts = c, task, parts
        self._part = parts.sent[task.part]
        self._residual = "residual" if task.part == ALL else f"residual-{task.part}"
        self._down = channel(c.downlink, c, parts.shared.layout.fingerprint, parts.shared.layout.size)
        self._up = channel(c.uplink, c, self._part.layout.fingerprint, self._part.layout.size)
        self._seed = derive_seed(config.seed, name, task.round, "uplink")
        self.state = NodeState(root, task.run_uuid, name) if config.keeps_state else None
        self.state_lost = False  # whether what this node had kept was gone

    def receive(self, frames: Mapping[str, bytes], initial: Values) -> Values:
        """The weights to train from, given the frames of a message and the `initial` weights.

        Raises:
            FrameError: a frame is corrupt.
            StateLostError: the frames add to what this node does not hold.
        """
        number, shared = self._task.round, self._parts.shared
        if self._codec.shadow:
            assert self.state
            whole = frames.get("shadow")
            steps = {int(name.removeprefix("frame-")): frame for name, frame in frames.items() if name != "shadow"}
            start = shared.take(initial)
            values = self.state.shadow(number, self._task.shadow, steps, whole, self._down, start)
        else:
            values = self._down.decode(frames[f"frame-{number}"], "weights", number)
        vector = initial.copy()
        shared.put(values, vector)
        if self._parts.personal.layout.names:
            kept = self._kept("personal", self._task.acked_any, self._parts.personal)
            if kept is not None:
                self._parts.personal.put(kept, vector)
        return vector

    def start(self, received: Values) -> Values:
        """Where training starts: the received weights plus what coding kept this node from sending so far.

        This is error feedback that steps ahead (Xu, Huo and Huang 2020, arXiv 2008.05823): what a round
        did not send is in the next one's difference to the received weights by itself. Adding it to the
        difference afterwards (Seide et al. 2014) counts double what local training learns anew, since it
        starts without it. A decay below 1 forgets what has grown stale.
        """
        kept = self._kept(self._residual, self._task.acked, self._part) if self._codec.error_feedback else None
        if kept is None:
            return received
        shared = self._parts.shared.take(received)
        self._part.put(self._part.take(shared) + np.float32(self._codec.residual_decay) * kept, shared)
        vector = received.copy()
        self._parts.shared.put(shared, vector)
        return vector

    def send(self, trained: Tensor, received: Values) -> Sent:
        """Code the part of the trained weights that is to be sent, or its difference to what was received."""
        c, number, part = self._codec, self._task.round, self._part
        wanted = trained if c.target == "weights" else trained - torch.from_numpy(received).to(trained.device)
        if self._parts.personal.layout.names or len(self._parts.sent) > 1:
            wanted = _take(part, _take(self._parts.shared, wanted))
        frame, decoded = self._up.code(wanted, c.target, number, self._seed)
        meant = wanted.cpu().numpy()
        left = meant - decoded
        if c.error_feedback:
            self._keep(self._residual, left, part, (self._task.acked, self._task.durable))
        if self._parts.personal.layout.names:
            values = self._parts.personal.take(trained.cpu().numpy())
            still = (self._task.acked_any, self._task.durable_any)
            self._keep("personal", values, self._parts.personal, still)
        norm = float(np.linalg.norm(meant.astype(np.float64)))
        return Sent(frame, float(np.linalg.norm(left.astype(np.float64))) / norm if norm else 0.0)

    def _kept(self, kind: str, acked: int, part: Part) -> Values | None:
        """What this node kept as of the acknowledged round; None where there was none, or it is lost."""
        assert self.state
        if acked == 0:
            return None
        try:
            return self.state.read(kind, acked, part.layout.fingerprint, part.layout.size)
        except StateLostError as error:
            log.warning("%s; it begins anew", error)
            self.state_lost = True
            return None

    def _keep(self, kind: str, values: Values, part: Part, still: tuple[int, ...]) -> None:
        assert self.state
        self.state.write(kind, self._task.round, values, part.layout.fingerprint, still)


def _take(part: Part, vector: Tensor) -> Tensor:
    return torch.cat([vector[s] for s in part.slices])
