"""What a node's training has of the rounds before, from the server and its own files, and what it leaves."""

from __future__ import annotations

import numpy as np

from feddm_flwr.config import RunConfig
from feddm_flwr.exchange.extras import Extras
from feddm_flwr.exchange.node_state import NodeState
from feddm_flwr.exchange.partial import Split
from feddm_flwr.protocol.tasks import CONTROL, MOMENTS, MOMENTUM, TrainTask
from feddm_flwr.training.loop import Inherited, Trained
from feddm_flwr.training.moments import Kept, Memory, Shared
from feddm_flwr.vector import Layout, Vector


class Own:
    """One node's, in one round."""

    def __init__(self, config: RunConfig, split: Split, task: TrainTask, state: NodeState | None, got: Extras) -> None:
        """Begins with what the server sent beside the weights; there is a `state` where the configuration needs it."""
        self._config, self._split, self._task, self._state, self._got = config, split, task, state, got
        self._control: Vector | None = None  # this node's control variate, of the shared parameters
        self._told = True  # whether the server knows it, but for its last change

    def inherited(self, whole: Layout, received: Vector, start: Vector | None) -> Inherited:
        """Returns what the training begins with, of parameters that have the layout `whole`."""
        t = self._config.train
        memory: Memory | None = None
        if t.moments == "server":
            shared = self._split.shared.layout.names
            moments = {name: self._got[name] for name in (MOMENTS, MOMENTUM) if name in self._got}
            memory = Shared([name in shared for name in whole.names], moments or None, self._task.steps_before)
        elif t.moments == "node":
            memory = Kept(self._recalled("optimizer", Kept.layout(whole.size)))
        last_step = self._last_step(received) if t.alignment else None
        return Inherited(start, memory, last_step, self._correction(received) if t.control == "scaffold" else None)

    def leave(self, trained: Trained) -> Extras:
        """Keeps what the node's next round begins with; returns what the server is told beside the update."""
        told, t = dict(trained.moments or {}), self._config.train
        if t.moments == "node":
            self._keep("optimizer", kept := told.pop(MOMENTS), Kept.layout((len(kept) - 1) // 2))
        if self._control is not None and trained.control is not None:
            now = self._split.shared.take(trained.control)
            self._keep("control", now, self._split.shared.layout)
            told[CONTROL] = now - self._control if self._told else np.zeros_like(now)
        return told

    def _correction(self, received: Vector) -> Vector:
        """Returns how far the server's control variate is from this node's; 0 for personal parameters."""
        layout = self._split.shared.layout
        zeros = np.zeros(layout.size, np.float32)
        recalled = self._recalled("control", layout)
        self._control = zeros if recalled is None else recalled
        if recalled is None and self._task.acked_any:  # it is lost: nothing says how far the server's is from it
            self._told = False
            return self._whole(zeros, received)
        return self._whole(self._got.get(CONTROL, zeros) - self._control, received)

    def _last_step(self, received: Vector) -> Vector | None:
        """Returns how far the global weights have come since the last round, 0 for personal parameters, and keeps those
        of this round; None where this node's last reply did not count: what it holds from then is not for sure."""
        assert self._state
        layout, last, task = self._split.shared.layout, self._task.round - 1, self._task
        before = self._state.recall("received", last, layout) if task.acked_any == last else None
        now = self._split.shared.take(received)
        self._state.write("received", task.round, now, layout, {task.durable_any})
        return None if before is None else self._whole(now - before, received)

    def _whole(self, shared: Vector, like: Vector) -> Vector:
        """Returns a vector of all parameters from one of those that are shared; others are 0."""
        found = np.zeros_like(like)
        self._split.shared.put(shared, found)
        return found

    def _recalled(self, kind: str, layout: Layout) -> Vector | None:
        """Returns what was kept as of this node's last reply that counted."""
        assert self._state
        return self._state.recall(kind, self._task.acked_any, layout)

    def _keep(self, kind: str, vector: Vector, layout: Layout) -> None:
        assert self._state
        self._state.write(kind, self._task.round, vector, layout, {self._task.acked_any, self._task.durable_any})
