"""Flower's transport replaced by a pool of processes that run the real client app.

The same strategy, nodes, frames and bits as in a simulation, without Ray's start for every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from feddm_flwr.config import RunConfig, flatten

TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # else Flower makes no messages


def _answer(message: Message, keys: dict[str, Any], index: int, count: int) -> Message:
    from feddm_flwr.client_app import app

    own = {"partition-id": index, "num-partitions": count}
    return app(message, Context(run_id=1, node_id=index, node_config=own, state=RecordDict(), run_config=keys))


def pool(processes: int) -> ProcessPoolExecutor:
    """Processes for `PoolGrid`, which several runs can use one after the other."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


class InProcessGrid(Grid):
    """What every grid without Flower's transport has in common: names for messages, and no runs."""

    def __init__(self) -> None:
        self._names = itertools.count()

    def name(self, message: Message) -> str:
        """Give the message an id, as Flower would."""
        name = str(next(self._names))
        message.metadata.__dict__["_message_id"] = name
        return name

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


class PoolGrid(InProcessGrid):
    """The nodes of one run."""

    def __init__(self, processes: ProcessPoolExecutor, config: RunConfig, nodes: int) -> None:
        super().__init__()
        self._processes, self._keys, self._nodes = processes, flatten(config), nodes
        self._replies: dict[str, Future[Message]] = {}

    def get_node_ids(self) -> Iterable[int]:
        return range(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            name = self.name(message)
            node = message.metadata.dst_node_id
            self._replies[name] = self._processes.submit(_answer, message, self._keys, node, self._nodes)
            yield name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in message_ids:
            if name in self._replies and self._replies[name].done():
                yield self._replies.pop(name).result()
