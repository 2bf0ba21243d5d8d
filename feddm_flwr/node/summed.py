"""What a node sends where the server learns sums only: its update and its losses, in digits under masks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np

from feddm_flwr.config import RunConfig
from feddm_flwr.exchange.channel import fingerprint
from feddm_flwr.exchange.partial import ALL, Split
from feddm_flwr.exchange.sums import Figures, SumGrid, SumSender, facts_of, scales_in, shares_of, write_words
from feddm_flwr.node.secure import SecureNode
from feddm_flwr.protocol.replies import TrainReply
from feddm_flwr.protocol.tasks import SCALES, Frames, TrainTask
from feddm_flwr.vector import Vector


class Summed:
    """A node's update in one round."""

    def __init__(
        self, config: RunConfig, split: Split, name: str, task: TrainTask, frames: Frames, secure: SecureNode
    ) -> None:
        """Takes part in the sum that the task is about, as node `name`.

        Raises:
            FrameError: the frame of the scales is corrupt.
        """
        self._config, self._task, self._secure, self._scales = config, task, secure, frames[SCALES]
        layout = split.sent[ALL].layout
        self._layout = layout.fingerprint
        images = json.loads(task.secure)["images"]
        self._images = images[name]
        self._grid = SumGrid(config, layout.size, task.round, shares_of(config, images))
        self.sender = SumSender(self._grid, scales_in(frames[SCALES], self._grid, task.round, self._layout), name)

    def send(self, coded: bytes, received: Vector, reply: TrainReply, held_out: int) -> tuple[TrainReply, bytes]:
        """Returns the reply without what is told in the sum, and the frame of the masked words; `received` are the
        shared weights.

        Raises:
            SecureSumError: as `SecureNode.mask`.
        """
        told = replace(reply, train_loss=0.0, coding_error=0.0, eval_loss=None, eval_levels=[])
        if self._images != reply.images:
            return told, b""  # the server asks anew what this node has
        loss = math.nan if reply.eval_loss is None else reply.eval_loss
        figures = Figures(reply.train_loss, reply.coding_error, loss, reply.eval_levels)
        words = self._grid.with_figures(np.frombuffer(coded, np.uint64), figures, reply.images, held_out)
        facts = facts_of(self._config, self._task, self._task.shadow or fingerprint(received), self._scales)
        self._secure.mask(words, self._task, reply.images, facts)
        return told, write_words(words, self._layout, self._task.round)
