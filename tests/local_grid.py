"""A federation in this process, for tests of the round loop.

The nodes run the real client app; only Flower's transport is replaced by one that delivers what a
test wants, when it wants.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from pool_grid import InProcessGrid

from feddm_flwr import server_app
from feddm_flwr.client_app import app
from feddm_flwr.config import RunConfig, flatten, parse
from feddm_flwr.config.fields import PRESET
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.models import networks, parameters
from feddm_flwr.protocol.replies import Introduction
from feddm_flwr.server.federation import dispatch, roster
from feddm_flwr.server.federation.roster import Roster
from feddm_flwr.server.round import RoundResult
from feddm_flwr.server.strategy import FedDM

Handler = Callable[[Message], Message | None]

roster._PAUSE = dispatch._PAUSE = 0.01  # nobody is far away

TINY: dict[str, Any] = {
    "model.preset": "tiny",
    "num-server-rounds": 2,
    "train.local-steps": 2,
    "train.batch-size": 8,
    "train.threads": 1,
    "eval.images": 16,
    "round-timeout": 60.0,
    "max-round-retries": 0,
}


#: Of the network, where that of the preset is not needed, which takes several times as long.
SMALLER = {"model.block-channels": "8", "model.attention": "0", "model.attention-head-dim": 8}
AS_PRESET = dict.fromkeys(("model__block_channels", "model__attention", "model__attention_head_dim"), PRESET)


def config(**keys: Any) -> RunConfig:
    own = {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    return parse({**TINY, **({} if "model.init-from" in own else SMALLER), **own})


class LocalGrid(InProcessGrid):
    """Delivers messages to handlers in this process and replies in an order of the test's choosing."""

    def __init__(self, handlers: dict[int, Handler], *, backwards: bool = False) -> None:
        super().__init__()
        self.handlers, self.backwards = handlers, backwards
        self.registered: dict[int, str] = {}
        self.activated: dict[int, str] = {}  # when nodes came last
        self.messages: dict[str, Message] = {}
        self.replies: dict[str, Message | None] = {}
        self.one_at_a_time = threading.Lock()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.handlers)

    def get_nodes(self) -> Iterable[NodeInfo]:
        registered, activated = self.registered, self.activated
        return [NodeInfo(node_id=i, name=registered.get(i), last_activated_at=activated.get(i)) for i in self.handlers]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            name = self.name(message)
            self.messages[name] = message
            yield name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self.one_at_a_time:
            yield from self._answer(message_ids)

    def _answer(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = sorted((m for m in self.messages if m not in self.replies), key=int, reverse=self.backwards)
        for name in waiting[:1]:  # one more answer becomes ready each time somebody asks
            message = self.messages[name]
            self.replies[name] = self.handlers[message.metadata.dst_node_id](message)
        for name in message_ids:
            if reply := self.replies.get(name):
                self.replies[name] = None
                yield reply


def node(c: RunConfig, index: int, count: int = 4, **node_config: Any) -> Handler:
    """A node that runs the real client app."""
    own = {"partition-id": index, "num-partitions": count, **node_config}

    def handle(message: Message) -> Message:
        context = Context(run_id=1, node_id=index, node_config=own, state=RecordDict(), run_config=flatten(c))
        return app(message, context)

    return handle


def nodes(c: RunConfig, count: int = 4) -> dict[int, Handler]:
    return {1000 - i: node(c, i, count) for i in range(count)}


def feddm(c: RunConfig) -> FedDM:
    network = networks.build(c, {})
    parts = split_of(parameters.layout(network), c)
    return FedDM(c, parts.shared.take(parameters.to_vector(network)), parts, uuid.uuid4().hex)


def run(c: RunConfig, handlers: dict[int, Handler] | None = None, *, backwards: bool = False) -> list[RoundResult]:
    return list(feddm(c).run(LocalGrid(handlers or nodes(c), backwards=backwards)))


def run_server(c: RunConfig, handlers: dict[int, Handler] | None = None) -> None:
    """A whole run of the server app, with nodes in this process."""
    log = logging.getLogger("feddm_flwr")
    before = log.handlers, log.propagate, log.level
    try:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flatten(c))
        server_app.main(LocalGrid(handlers or nodes(c)), context)
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


def row(number: int, **figures: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl`, of zeros but for some figures."""
    zeros = {f.name: 0 for f in fields(RoundResult) if f.name not in ("weights", "eval_losses")}
    return {**zeros, "eval_levels": [], "failures": {}, "nodes": {}, **figures, "round": number}


def on_train(
    handle: Handler, change: Callable[[Message, Message], Message | None], kind: str = MessageType.TRAIN
) -> Handler:
    """The node, with its replies to training, or what else is of a `kind`, replaced by `change(message, reply)`."""

    def changed(message: Message) -> Message | None:
        reply = handle(message)
        assert reply
        return change(message, reply) if message.metadata.message_type == kind else reply

    return changed


def on_query(handle: Handler, **changes: Any) -> Handler:
    """The node, with changes to its introduction."""

    def changed(message: Message) -> Message | None:
        reply = handle(message)
        assert reply
        if message.metadata.message_type != "query":
            return reply
        report = {k: v for k, v in {**reply.content["report"], **changes}.items() if v is not None}
        return Message(RecordDict({"report": ConfigRecord(report)}), reply_to=message)

    return changed


def weights_without_node_3(c: RunConfig) -> bytes:
    """Of a run of one round that node-3 does not take part in."""
    handlers = nodes(c)
    del handlers[997]
    (done,) = run(c, handlers)
    assert done.clients_ok == 3
    return done.weights.tobytes()


def failing(c: RunConfig, count: int, times: int) -> dict[int, Handler]:
    """Nodes of which the first `count` fail the first `times` times."""
    handlers = nodes(c)
    left = dict.fromkeys(sorted(handlers)[:count], times)

    def fail(i: int) -> Callable[[Message, Message], Message]:
        def change(message: Message, reply: Message) -> Message:
            left[i] -= 1
            return Message(Error(2, "broken"), reply_to=message) if left[i] >= 0 else reply

        return change

    return {i: on_train(h, fail(i)) if i in left else h for i, h in handlers.items()}


def introductions(c: RunConfig) -> dict[str, Introduction]:
    """What the nodes say of themselves, by name."""
    roster = Roster(c)
    roster.wait(LocalGrid(nodes(c)), first=True)
    return roster.nodes
