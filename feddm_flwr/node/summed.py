"""What a node sends where the server learns sums only: its update and its losses, in digits under masks."""

from __future__ import annotations

import json

import numpy as np

from feddm_flwr.config import RunConfig
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.exchange.channel import fingerprint
from feddm_flwr.exchange.partial import ALL, Split
from feddm_flwr.exchange.sums import Figures, SumGrid, SumSender, facts_of, scales_in, shares_of, write_words
from feddm_flwr.node.secure import SecureNode
from feddm_flwr.protocol.tasks import SCALES, Frames, TrainTask
from feddm_flwr.training.objectives import HeldOut
from feddm_flwr.vector import Vector


class Summed:
    """A node's update in one round."""

    def __init__(
        self,
        config: RunConfig,
        split: Split,
        name: str,
        task: TrainTask,
        frames: Frames,
        secure: SecureNode,
        received: Vector,
        data: NodeData,
    ) -> None:
        """Takes part in the sum that the task is about, as node `name`, which trains on `data` from what it `received`.

        Raises:
            FrameError: the frame of the scales is corrupt.
            SecureSumError: as `SecureNode.check`.
        """
        layout = split.sent[ALL].layout
        self._layout, self._task, self._secure = layout.fingerprint, task, secure
        self._counts = len(data.train), len(data.held_out)
        secure.check(task)
        # Whatever the server says that the weights are.
        self._facts = facts_of(config, task, fingerprint(split.shared.take(received)), frames[SCALES])
        self._grid = SumGrid(config, layout.size, task.round, shares_of(config, json.loads(task.secure)["images"]))
        self.sender = SumSender(self._grid, scales_in(frames[SCALES], self._grid, task.round, self._layout), name)

    def frame(self, coded: bytes, error: float, figures: tuple[float, HeldOut]) -> bytes:
        """Returns the frame of the masked words of an update, and of what the coding, the training and the held-out
        images lost, which is told in the sum.

        Raises:
            SecureSumError: as `SecureNode.mask`.
        """
        loss, held_out = figures
        told = Figures(loss, error, held_out.loss, held_out.levels)
        words = self._grid.with_figures(np.frombuffer(coded, np.uint64), told, *self._counts)
        self._secure.mask(words, self._task, self._facts)
        return write_words(words, self._layout, self._task.round)
