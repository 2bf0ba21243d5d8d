"""Asking nodes, and their replies: processes that die, restarts, slow uploads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable

import pytest
from flwr.app import Error, Message
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.superlink.grid import http_grid
from local_grid import Handler, LocalGrid, config, feddm, node, nodes, on_train, run

from feddm_flwr.server.federation import liveness

C = config(num_server_rounds=1)


class Uploads(LocalGrid):
    """Replies come through Flower's own function, as from real nodes: in chunks, which may be missing."""

    def __init__(self, handlers: dict[int, Handler], missing: Collection[str]) -> None:
        super().__init__(handlers)
        self.missing = missing  # names of nodes whose replies to the training are not there in full
        self.fetched: Counter[str] = Counter()  # chunks, by node

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if "weights" in reply.content.array_records:
                name = str(reply.content.config_records["report"]["name"])
                chunks = [f"{name} {i}" for i in range(4)]
                http_grid.pull_objects(object_ids=chunks, pull_object_fn=self.fetch)  # type: ignore[attr-defined]
        return replies

    def fetch(self, chunk: str) -> bytes:
        name, number = chunk.split()
        if number == "3" and name in self.missing:
            raise ObjectUnavailableError(chunk)
        self.fetched[name] += 1
        return bytes(10)


def test_a_node_whose_process_died_is_asked_again_and_nothing_is_lost() -> None:
    died: list[int] = []

    def once(message: Message, reply: Message) -> Message:
        died.append(1)
        return Message(Error(0, "actor died"), reply_to=message) if len(died) == 1 else reply

    handlers = nodes(C)
    handlers[998] = on_train(handlers[998], once)
    (done,) = run(C, handlers)
    (undisturbed,) = run(C)
    assert done.clients_failed == 0
    assert done.weights.tobytes() == undisturbed.weights.tobytes()
    assert done.bytes_down == undisturbed.bytes_down * 5 // 4


def test_a_node_that_was_restarted_in_the_middle_of_its_task_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower waits for the reply of the process that is gone, since the new one has its id."""
    monkeypatch.setattr(liveness, "_FIRST", 0.1)
    c = config(num_server_rounds=1)
    handlers = nodes(c)
    unlucky, trained = min(handlers), 0

    def handle(message: Message) -> Message | None:
        nonlocal trained
        if message.metadata.message_type == "train":
            trained += 1
            if trained == 1:
                return None  # the process that was given it is gone
        reply = handlers[unlucky](message)
        assert reply
        if "report" in reply.content.config_records and message.metadata.message_type == "query":
            reply.content.config_records["report"]["process"] = f"process {min(trained, 1)}"
        return reply

    (done,) = run(c, {**handlers, unlucky: handle})
    assert trained == 2
    assert done.clients_ok == 4
    assert done.weights.tobytes() == run(c)[-1].weights.tobytes()


def test_slow_uploads_hold_up_nobody_and_end_with_the_round() -> None:
    """Flower's pull does not return before the reply is whole."""
    c = config(num_server_rounds=1, round_timeout=12.0, min_replies=2)
    slow = [f"node-{i}" for i in range(12) if i not in (8, 9)]  # these are the last that are asked
    (done,) = feddm(c).run(Uploads({i: node(c, i, 12) for i in range(12)}, slow))
    assert (done.clients_ok, done.failures) == (2, {"timeout": 10})


def test_a_slow_upload_is_taken_in_once_it_is_whole_and_waits_with_nothing_in_memory() -> None:
    c = config(num_server_rounds=1, round_timeout=60.0)
    missing = {"node-3"}
    grid = Uploads(nodes(c), missing)
    threading.Timer(5.0, missing.clear).start()
    (done,) = feddm(c).run(grid)
    assert (done.clients_ok, done.failures) == (4, {})
    assert grid.fetched["node-0"] == 4
    assert grid.fetched["node-3"] > 8  # again from the start, once all were there
