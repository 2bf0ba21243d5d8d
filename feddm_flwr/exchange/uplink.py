"""From the nodes to the server: what a node sends of its training, and what the server takes for its update.

Under `codec.target = delta` a node sends what its training changed, and starts its next training with what the coding
lost (error feedback). Under `weights` it sends the weights, and the server subtracts what the node had received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.codecs.framing import Frame
from feddm_flwr.config import SUM, RunConfig, derive_seed
from feddm_flwr.exchange.channel import channel
from feddm_flwr.exchange.node_state import NodeState
from feddm_flwr.exchange.partial import ALL, Split, Subset
from feddm_flwr.exchange.sums import SumSender
from feddm_flwr.protocol.tasks import TrainTask
from feddm_flwr.vector import Vector


@dataclass(frozen=True)
class Sent:
    """A node's coded reply."""

    frame: bytes
    error: float  # norm of what the coding lost over that of what was to be sent


class UplinkSender:
    """A node's end in one round."""

    def __init__(
        self,
        config: RunConfig,
        split: Split,
        name: str,
        task: TrainTask,
        state: NodeState | None,
        summed: SumSender | None = None,
    ) -> None:
        """Sends as node `name`, whose `state` is kept where there is some; `summed` is how it codes for a sum."""
        self._codec, self._split, self._task, self._state = config.codec, split, task, state
        self._part = split.sent[task.part]
        self._residual = "residual" if task.part == ALL else f"residual-{task.part}"
        layout = self._part.layout
        self._up = summed or channel(self._codec.uplink, self._codec, layout.fingerprint, layout.size)
        self._seed = derive_seed(config.seed, name, task.round, "uplink")

    def start(self, received: Vector) -> Vector:
        """Returns where training starts: the received weights plus what coding kept this node from sending so far.

        This is error feedback that steps ahead (Xu, Huo and Huang 2020, arXiv 2008.05823): what a round
        did not send is in the next one's difference to the received weights by itself. Adding it to the
        difference afterwards (Seide et al. 2014) counts double what local training learns anew, since it
        starts without it. A decay below 1 forgets what has grown stale.
        """
        if not self._codec.error_feedback:
            return received
        assert self._state
        kept = self._state.recall(self._residual, self._task.acked, self._part.layout)
        if kept is None:
            return received
        shared = self._split.shared.take(received)
        self._part.put(self._part.take(shared) + np.float32(self._codec.residual_decay) * kept, shared)
        vector = received.copy()
        self._split.shared.put(shared, vector)
        return vector

    def send(self, trained: Tensor, received: Vector, seal: Callable[[bytes, float], bytes] | None = None) -> Sent:
        """Codes the part of the trained weights that is to be sent, or its difference to what was received; `seal`
        makes a frame of what is coded and of how much that lost, before anything is kept."""
        target, task = self._codec.target, self._task
        wanted = trained if target == "weights" else trained - torch.from_numpy(received).to(trained.device)
        if self._split.personal.layout.names or len(self._split.sent) > 1:
            wanted = _take(self._part, _take(self._split.shared, wanted))
        frame, decoded = self._up.code(wanted, target, task.round, self._seed)
        meant = wanted.cpu().numpy()
        left = meant - decoded
        norm = float(np.linalg.norm(meant.astype(np.float64)))
        error = float(np.linalg.norm(left.astype(np.float64))) / norm if norm else 0.0
        if seal:
            frame = seal(frame, error)
        if self._codec.error_feedback:
            assert self._state
            self._state.write(self._residual, task.round, left, self._part.layout, (task.acked, task.durable))
        if self._split.personal.layout.names:
            assert self._state
            values = self._split.personal.take(trained.cpu().numpy())
            still = (task.acked_any, task.durable_any)
            self._state.write("personal", task.round, values, self._split.personal.layout, still)
        return Sent(frame, error)


class UplinkReceiver:
    """The server's end: a node's update, from the frame that it sent."""

    def __init__(self, config: RunConfig, split: Split) -> None:
        """Receives the parts that `split` says are sent."""
        c = config.codec
        self._target, self._split = c.target, split
        self.parts = tuple(split.sent)  # their names
        self._channels = {
            name: channel(c.uplink, c, part.layout.fingerprint, part.layout.size)
            for name, part in split.sent.items()
            if c.uplink != SUM  # of which there is no single one to receive
        }

    def size(self, part: str) -> int:
        """Returns the number of values of a part."""
        return self._split.sent[part].layout.size

    def update(self, part: str, frame: bytes, number: int, received: Vector) -> Vector:
        """Returns what a node's training changed in round `number`, given what all nodes had `received`.

        Raises:
            FrameError: the frame is corrupt, or of something else.
        """
        vector = self._channels[part].decode(frame, self._target, number)
        if (base := self._base(part, received)) is not None:
            vector -= base
        return vector

    def decoder(self, part: str, number: int, received: Vector) -> Callable[[Frame], Iterator[Vector]]:
        """Returns a function that yields the update in a frame, as `update`, one chunk after the other."""
        base_of_all = cache(lambda: self._base(part, received))  # one copy, made when it is needed

        def chunks(frame: Frame) -> Iterator[Vector]:
            start, base = 0, base_of_all()
            for chunk in self._channels[part].decode_chunks(frame, self._target, number):
                yield chunk if base is None else chunk - base[start : start + len(chunk)]
                start += len(chunk)

        return chunks

    def _base(self, part: str, received: Vector) -> Vector | None:
        """Returns what is subtracted from what nodes send to have their update."""
        return self._split.sent[part].take(received) if self._target == "weights" else None


def _take(part: Subset, vector: Tensor) -> Tensor:
    return torch.cat([vector[s] for s in part.slices])
