"""The round loop against nodes that answer late, wrongly, or not at all. Runs through Flower itself are
in `test_app.py`.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
)
from flwr.superlink.grid import http_grid
from local_grid import Handler, LocalGrid, config, feddm, node, nodes, on_query, on_train, run

from feddm_flwr.client_app import app
from feddm_flwr.config import ConfigError, RunConfig, flatten
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.server.federation import liveness
from feddm_flwr.server.federation.roster import Roster
from feddm_flwr.server.round import RoundResult


@pytest.mark.parametrize("strategy", ["feddm-vanilla", "feddm-prox", "feddm-quant"])
def test_the_order_of_replies_does_not_change_a_bit(strategy: str) -> None:
    c = config(strategy=strategy, server__optimizer="nesterov")
    assert run(c)[-1].weights.tobytes() == run(c, backwards=True)[-1].weights.tobytes()


def frames(c: RunConfig) -> tuple[list[RoundResult], list[tuple[str, bytes]]]:
    """A run, and the frames that its nodes sent."""
    sent: list[tuple[str, bytes]] = []

    def record(message: Message, reply: Message) -> Message:
        report = reply.content.config_records["report"]
        sent.append((str(report["name"]), reply.content.array_records["weights"]["frame"].data))
        return reply

    return run(c, {i: on_train(h, record) for i, h in nodes(c).items()}), sent


@pytest.mark.parametrize("strategy", ["feddm-vanilla", "feddm-quant"])
def test_under_averaging_the_model_is_the_mean_of_what_the_nodes_sent(strategy: str) -> None:
    c = config(strategy=strategy, num_server_rounds=1)
    (done,), sent = frames(c)
    server = feddm(c)
    images = {node.name: node.images for node in run_nodes(c).values()}
    mean = np.average(
        [server._receiver._channels["all"].decode(frame, "weights", 1).astype(np.float64) for _, frame in sorted(sent)],
        axis=0,
        weights=[images[name] for name, _ in sorted(sent)],
    )
    np.testing.assert_allclose(done.weights, mean, rtol=1e-5, atol=1e-7)
    assert done.clients_ok == 4
    assert done.bytes_up == sum(len(frame) for _, frame in sent)


def run_nodes(c: RunConfig) -> dict[str, Any]:
    roster = Roster(c)
    roster.wait(LocalGrid(nodes(c)), first=True)
    return roster.nodes


def test_quant_needs_a_quarter_of_the_bytes_each_way_and_trains_as_well() -> None:
    quant, vanilla = (run(config(strategy=s)) for s in ("feddm-quant", "feddm-vanilla"))
    for done in quant:
        assert done.bytes_up_fp32 / done.bytes_up >= 3.9
        assert done.bytes_down_fp32 / done.bytes_down >= 3.9
    assert quant[-1].train_loss == pytest.approx(vanilla[-1].train_loss, rel=0.02)


def test_prox_and_vanilla_differ_only_by_the_proximal_term() -> None:
    assert (
        run(config(strategy="feddm-prox", train__mu=1e-30))[-1].weights.tobytes() == run(config())[-1].weights.tobytes()
    )


def with_frame(reply: Message, frame: bytes, message: Message) -> Message:
    arrays = ArrayRecord({"frame": Array("uint8", (len(frame),), "feddm.frame", frame)})
    return Message(RecordDict({"weights": arrays, "report": reply.content["report"]}), reply_to=message)


def with_report(reply: Message, message: Message, **changes: Any) -> Message:
    report = {k: v for k, v in {**reply.content["report"], **changes}.items() if v is not None}
    return Message(RecordDict({"weights": reply.content["weights"], "report": ConfigRecord(report)}), reply_to=message)


def a_frame(c: RunConfig, value: float, *, number: int = 1) -> bytes:
    up = feddm(c)._receiver._channels["all"]
    vector = np.full(up.size, 1.0, np.float32)
    frame = bytearray(up.encode(vector, "weights", number))
    if value != 1.0:  # past the sender's own check
        from feddm_flwr.codecs import framing

        planes = np.full(up.size, value, "<f4").view(np.uint8).reshape(-1, 4).T
        frame = bytearray(framing.write(framing.read_header(bytes(frame))[0], [[plane.tobytes() for plane in planes]]))
    return bytes(frame)


C = config(num_server_rounds=1)
FAULTS: dict[str, tuple[str, Callable[[Message, Message], Message | None]]] = {
    "nan weights": ("bad-frame", lambda m, r: with_frame(r, a_frame(C, np.nan), m)),
    "huge weights": ("outlier", lambda m, r: with_frame(r, a_frame(C, 1e29), m)),
    "absurd weights": ("bad-frame", lambda m, r: with_frame(r, a_frame(C, 1e38), m)),
    "noise": ("bad-frame", lambda m, r: with_frame(r, b"noise" * 100, m)),
    "empty frame": ("bad-frame", lambda m, r: with_frame(r, b"", m)),
    "frame of another round": ("bad-frame", lambda m, r: with_frame(r, a_frame(C, 1.0, number=2), m)),
    "frame of another model": (
        "bad-frame",
        lambda m, r: with_frame(r, a_frame(config(model__block_channels="16,64"), 1.0), m),
    ),
    "report of another round": ("stale", lambda m, r: with_report(r, m, round=5)),
    "another node's name": ("stale", lambda m, r: with_report(r, m, name="node-0")),
    "no losses": ("malformed", lambda m, r: with_report(r, m, **{"train-loss": None})),
    "a loss that is not a number": ("malformed", lambda m, r: with_report(r, m, **{"train-loss": float("nan")})),
    "a coding error that is not a number": (
        "malformed",
        lambda m, r: with_report(r, m, **{"coding-error": float("inf")}),
    ),
    "negative steps": ("malformed", lambda m, r: with_report(r, m, steps=-40)),
    "more steps than asked for": ("malformed", lambda m, r: with_report(r, m, steps=2**40)),
    "text for a count": ("malformed", lambda m, r: with_report(r, m, steps="many")),
    "nothing in it": ("malformed", lambda m, r: Message(RecordDict(), reply_to=m)),
    "exception": ("exception", lambda m, r: Message(Error(2, "it\nbroke"), reply_to=m)),
    "gone": ("node-offline", lambda m, r: Message(Error(5, "gone"), reply_to=m)),
    "process died": ("process-died", lambda m, r: Message(Error(8, "killed"), reply_to=m)),
    "silence": ("timeout", lambda m, r: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_node_costs_its_reply_and_nothing_else(fault: str) -> None:
    reason, change = FAULTS[fault]
    c = config(num_server_rounds=1, round_timeout=3.0) if fault == "silence" else C
    handlers = nodes(c)
    handlers[997] = on_train(handlers[997], change)  # node-3
    (done,) = run(c, handlers)
    assert (done.clients_ok, done.clients_failed, done.failures) == (3, 1, {reason: 1})
    assert done.weights.tobytes() == weights_without_node_3()


def weights_without_node_3() -> bytes:
    handlers = nodes(C)
    del handlers[997]
    (done,) = run(C, handlers)
    assert done.clients_ok == 3
    return done.weights.tobytes()


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


def failing(count: int, times: int) -> dict[int, Handler]:
    """Nodes of which the first `count` fail the first `times` times."""
    handlers = nodes(C)
    left = dict.fromkeys(sorted(handlers)[:count], times)

    def fail(i: int) -> Callable[[Message, Message], Message]:
        def change(message: Message, reply: Message) -> Message:
            left[i] -= 1
            return Message(Error(2, "broken"), reply_to=message) if left[i] >= 0 else reply

        return change

    return {i: on_train(h, fail(i)) if i in left else h for i, h in handlers.items()}


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


def test_a_round_with_too_few_replies_is_repeated_and_its_bytes_are_counted() -> None:
    c = config(num_server_rounds=1, max_round_retries=1)
    (done,) = run(c, failing(3, 1))
    (undisturbed,) = run(c)
    assert done.weights.tobytes() == undisturbed.weights.tobytes()
    assert done.bytes_down == 2 * undisturbed.bytes_down
    assert done.bytes_up > undisturbed.bytes_up


@pytest.mark.parametrize("broken", [2, 4])
def test_a_run_with_too_few_replies_fails_loudly(broken: int) -> None:
    with pytest.raises(
        RunFailedError, match=f"{4 - broken} of 4 nodes gave a good reply, 3 are needed .{broken} exception"
    ):
        run(config(max_round_retries=1), failing(broken, 99))


@pytest.mark.parametrize(
    "keys",
    [
        {"min_replies": 5},
        {"min_nodes": 5},
        {"fraction_train": 0.5, "min_replies": 3},
        {"fraction_train": 0.5, "server__aggregation": "median"},
    ],
)
def test_too_few_nodes_end_the_run_after_the_waiting_time(keys: dict[str, Any]) -> None:
    with pytest.raises(RunFailedError, match=r"4 usable nodes of 4 connected, [56] are needed .*wait-timeout = 1 s"):
        run(config(wait_timeout=1.0, **keys))


def test_what_a_node_finds_wrong_ends_the_run_before_it_starts() -> None:
    c = config(data__partition="pathological", data__classes_per_node=11)
    with pytest.raises(
        ConfigError, match=r"^node-0, node-1, node-2 and 1 more: data.partition = 'pathological'[^\n]*$"
    ):
        run(c)
    with pytest.raises(ConfigError, match="unnamed: node-name is missing"):
        run(C, {1: node(C, 0), 2: lambda m: app(m, Context(1, 2, {}, RecordDict(), flatten(C)))})
    with pytest.raises(ConfigError, match=r"unnamed: node-name = 'a b' is not allowed"):
        run(C, {1: node(C, 0), 2: node(C, 1, **{"node-name": "a b"})})


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="site: two nodes have this name; give each its own node-name"):
        run(C, {i: node(C, i, **{"node-name": "site"}) for i in range(3)})


@pytest.mark.parametrize(
    ("registered", "problem"),
    [
        ({1000: "node-0", 999: "node-2"}, "node-1: the node is registered as 'node-2'; node-name must be"),
        ({1000: "node-1"}, r"node-\d: .*registered as"),
        ({1000: "St. Mary's\n"}, 'node-0: the node is registered as "St. Mary\'s"; node-name must be'),
    ],
)
def test_a_node_has_the_name_that_its_key_was_registered_under(registered: dict[int, str], problem: str) -> None:
    grid = LocalGrid(nodes(C))
    grid.registered = registered
    with pytest.raises(ConfigError, match=problem):
        Roster(C).wait(grid, first=True)
    grid = LocalGrid(nodes(C))
    grid.registered = {1000 - i: f"node-{i}" for i in range(3)}  # the last has none
    assert len(Roster(C).wait(grid, first=True)) == 4


def test_nobody_takes_a_registered_name(caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid(nodes(C, 4))
    grid.registered = {1000 - i: f"node-{i}" for i in range(4)}
    roster = Roster(C)
    roster.wait(grid, first=True)
    del grid.handlers[1000]
    grid.handlers[7] = node(C, 0)  # says that it is node-0, which is away
    grid.registered[7] = "seven"
    assert sorted(roster.wait(grid, first=False)) == ["node-1", "node-2", "node-3"]
    for _ in range(10):
        roster.wait(grid, first=False)
    assert "left out: node-0: the node is registered as 'seven'" in caplog.text


def test_a_large_federation_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="feddm_flwr")
    Roster(C).wait(LocalGrid(nodes(C, 60)), first=True)
    lines = [line for line in caplog.messages if re.match("node node-|[0-9]+ more", line)]
    assert len(lines) == 51
    assert re.fullmatch(r"10 more nodes; 1[0-9]{3} images in all, see nodes.json", lines[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x\nfeddm: round=1/2 asked=9"},
        {"name": "x\0"},
        {"name": 7},
        {"name": None},
        {"images": 0},
        {"images": 2**62},
        {"images": 1.5},
        {"held-out": -1},
        {"problem": "\n", "images": 0},
        {"problem": " ", "images": 2**62},
        {"problem": "\x07", "held-out": -1},
        {"class-counts": "[" * 100_000},
        {"class-counts": "[]"},
        {"class-counts": '{"a": "x"}'},
        {"class-counts": '{"a": -1}'},
    ],
    ids=str,
)
def test_a_node_with_a_bad_introduction_is_left_out(changes: dict[str, Any]) -> None:
    handlers = nodes(C)
    handlers[997] = on_query(handlers[997], **changes)  # node-3
    (done,) = run(C, handlers)
    assert (done.clients_ok, done.clients_failed) == (3, 0)
    assert done.weights.tobytes() == weights_without_node_3()


def test_an_introduction_that_fails_is_asked_for_again() -> None:
    tries: list[int] = []

    def second_time(message: Message) -> Message | None:
        tries.append(1)
        return Message(Error(5, "away"), reply_to=message) if len(tries) == 1 else node(C, 3)(message)

    (done,) = run(C, {**nodes(C), 997: second_time})
    assert done.clients_ok == 4


def test_a_run_without_a_usable_node_fails_at_once() -> None:
    def broken(message: Message) -> Message:
        return Message(Error(2, "no such module"), reply_to=message)

    with pytest.raises(RunFailedError, match=r"0 usable nodes of 2 connected.*exception: no such module"):
        run(C, {1: broken, 2: broken})


def test_a_restarted_node_keeps_its_name_while_its_old_id_is_still_listed() -> None:
    c = config(num_server_rounds=3)
    handlers = nodes(c)
    rounds: Iterator[RoundResult] = feddm(c).run(LocalGrid(handlers))
    assert next(rounds).clients_ok == 4
    handlers[5] = handlers[1000]  # node-0, under a new id
    handlers[1000] = lambda m: Message(Error(5, "gone"), reply_to=m)
    done = next(rounds)
    assert (done.clients_ok, done.clients_failed) == (4, 0)
    del handlers[1000]
    assert next(rounds).clients_ok == 4


def test_a_name_is_not_taken_from_a_node_that_is_silent_but_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feddm_flwr.server.federation.roster._ANSWER", 0.5)
    c = config(num_server_rounds=3)
    handlers = nodes(c)
    real = handlers[1000]
    rounds: Iterator[RoundResult] = feddm(c).run(LocalGrid(handlers))
    next(rounds)
    handlers[1000] = lambda m: None if m.metadata.message_type == "query" else real(m)  # it is busy
    handlers[5] = node(c, 1, **{"node-name": "node-0"})
    for done in rounds:
        assert (done.clients_ok, done.clients_failed) == (4, 0)
    assert done.weights.tobytes() == run(c)[-1].weights.tobytes()


def test_a_node_that_is_asked_again_keeps_its_name(caplog: pytest.LogCaptureFixture) -> None:
    roster, handlers = Roster(C), nodes(C)
    grid = LocalGrid(handlers)
    online = roster.wait(grid, first=True)
    roster.introduce_again("node-0")
    handlers[online["node-0"]] = node(C, 0, **{"node-name": "north"})
    for _ in range(20):
        assert {*roster.wait(grid, first=False)} == {"node-1", "node-2", "node-3"}
    assert "left out: north: this node was node-0 before" in caplog.messages


def test_a_node_that_was_restarted_while_nobody_looked_is_asked_anew() -> None:
    handlers: dict[int, Handler] = {**nodes(C), 997: on_query(node(C, 3), images=0)}
    grid, roster = LocalGrid(handlers), Roster(C)
    assert len(roster.wait(grid, first=True)) == 3  # without node-3
    handlers[5] = lambda _: None  # is killed while it reads its images
    for _ in range(5):
        assert len(roster.wait(grid, first=False)) == 3
    handlers |= {997: node(C, 3), 5: node(C, 4, 5)}  # both are well now, and have the ids that they had
    grid.activated = {997: "later", 5: "later"}
    for _ in range(10):
        online = roster.wait(grid, first=False)
    assert {**online, "node-3": 997, "node-4": 5} == online


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train__optimizer": "adamw8bit"}, "train.optimizer = 'adamw8bit': bitsandbytes is not installed"),
        ({"model__lora_rank": 4, "model__init_from": "x"}, "model.lora-rank = 4: peft is not installed"),
    ],
)
def test_a_node_without_what_the_run_needs_says_so_before_it_begins(
    keys: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feddm_flwr.client_app.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=said):
        Roster(config(**keys)).wait(LocalGrid(nodes(config(**keys))), first=True)


def test_a_problem_that_was_put_right_does_not_end_the_run() -> None:
    def once_wrong(message: Message) -> Message:
        handle = node(C, 0) if 1000 in grid.activated else on_query(node(C, 0), problem="no such folder")
        grid.activated[1000] = "later"
        reply = handle(message)
        assert reply
        return reply

    c = config(wait_timeout=2.0, round_timeout=1.0)
    grid = LocalGrid({**nodes(c), 1000: once_wrong, 999: lambda _: None})  # one reads its images for long
    assert {*Roster(c).wait(grid, first=True)} == {"node-0", "node-2", "node-3"}


def test_one_round_waits_for_a_node_that_is_asked_again_and_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    c = config(wait_timeout=1.0)
    roster, handlers = Roster(c), nodes(c)
    grid = LocalGrid(handlers)
    online = roster.wait(grid, first=True)
    roster.introduce_again("node-0")
    handlers[online["node-0"]] = lambda _: None
    for _ in range(3):
        assert {*roster.wait(grid, first=False)} == {"node-1", "node-2", "node-3"}
    assert len([line for line in caplog.messages if "the round begins without 1 nodes" in line]) == 1


def test_a_second_node_of_a_name_does_not_oust_the_one_that_works(caplog: pytest.LogCaptureFixture) -> None:
    c = config(num_server_rounds=3)
    handlers = nodes(c)
    rounds: Iterator[RoundResult] = feddm(c).run(LocalGrid(handlers))
    first = next(rounds)
    handlers[5] = node(c, 1, **{"node-name": "node-0"})
    (*_, last) = rounds
    assert (last.clients_ok, last.clients_failed) == (4, 0)
    assert "left out: node-0: another node of this name is at work; give each its own node-name" in caplog.messages
    assert {*first.nodes} == {*last.nodes}
    assert last.weights.tobytes() == run(c)[-1].weights.tobytes()


def test_a_new_node_takes_part_once_it_is_known_and_nobody_waits_for_it() -> None:
    c = config(num_server_rounds=3)
    handlers = nodes(c)
    rounds: Iterator[RoundResult] = feddm(c).run(LocalGrid(handlers))
    assert next(rounds).clients_ok == 4
    handlers[6] = lambda m: None  # never answers
    assert next(rounds).clients_ok == 4
    handlers[7] = node(c, 3, **{"node-name": "new"})
    assert next(rounds).clients_ok == 5


def test_a_node_whose_introduction_had_no_time_beside_long_rounds_takes_part_once_it_has() -> None:
    c = config(num_server_rounds=6)
    handlers, ttls = nodes(c), []
    rounds: Iterator[RoundResult] = feddm(c).run(LocalGrid(handlers))
    next(rounds)

    def late(message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            ttls.append(message.metadata.ttl)
            if len(ttls) < 5:
                return Message(Error(4, "it was not fetched while it was valid"), reply_to=message)
        return node(c, 3, **{"node-name": "late"})(message)

    handlers[7] = late
    assert [done.clients_ok for done in rounds] == [4, 4, 4, 4, 5]
    assert min(ttls) >= 2 * c.round_timeout


@pytest.mark.parametrize("keys", [{}, {"train__local_epochs": 1, "train__local_steps": 0, "train__batch_size": 64}])
def test_a_node_that_has_other_images_than_before_is_asked_what_it_has(
    keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    c = config(num_server_rounds=4, data__eval_fraction=0.0, **keys)
    handlers, grown = nodes(c), [False]
    server = feddm(c)

    def changed(message: Message) -> Message | None:
        count = 2 if grown[0] else 4
        grown[0] |= message.metadata.message_type == "train"
        return node(c, 1, count, **{"node-name": "node-3"})(message)

    rounds: Iterator[RoundResult] = server.run(LocalGrid(handlers | {min(handlers): changed}))
    had = [next(rounds) and {n.name: n.images for n in server.nodes}["node-3"] for _ in range(4)]
    assert had[0] < had[-1] == 1438 // 2
    assert caplog.messages.count("node node-3 has other images than it said") == 1
    assert ("steps; " in caplog.text) == bool(keys)


def test_what_a_node_finds_wrong_is_said_though_others_do_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    c = config(wait_timeout=1.0)
    wrong = node(c, 0, **{"node-name": "a b"})
    with pytest.raises(ConfigError, match="unnamed: node-name = 'a b' is not allowed"):
        run(c, {**nodes(c), 1: wrong, 2: lambda m: None})


def test_a_run_that_is_resumed_does_not_wait_for_a_node_that_finds_something_wrong(
    caplog: pytest.LogCaptureFixture,
) -> None:
    c = config(wait_timeout=600.0)
    roster = Roster(c)
    roster.expect([*run_nodes(c).values()])
    handlers = nodes(c)
    handlers[997] = on_query(handlers[997], problem="data-path = '/data': no such folder")
    assert len(roster.wait(LocalGrid(handlers), first=True)) == 3
    assert "left out: node-3: data-path = '/data': no such folder" in caplog.messages


def test_a_reply_that_names_one_frame_often_is_counted_once() -> None:
    def repeat(message: Message, reply: Message) -> Message:
        weights = reply.content.array_records["weights"]
        for i in range(100):
            reply.content[f"weights-{i}"] = weights
        return reply

    c = config(num_server_rounds=1)
    (honest,), (repeated,) = run(c), run(c, {i: on_train(handle, repeat) for i, handle in nodes(c).items()})
    assert repeated.bytes_up == honest.bytes_up


def test_a_node_that_reads_its_images_for_longer_than_nodes_are_waited_for_takes_part(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connected, but silent: it has until `round-timeout`."""
    monkeypatch.setattr("feddm_flwr.server.federation.roster._SLOW", 0.5)
    caplog.set_level("INFO", "feddm_flwr")
    c = config(wait_timeout=1.0, num_server_rounds=1, min_nodes=4)
    grid, ready = LocalGrid(nodes(c)), time.monotonic() + 2.5
    answer = grid.pull_messages
    asked: dict[str, int] = {}

    def push(messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            (name,) = LocalGrid.push_messages(grid, [message])
            asked[name] = message.metadata.dst_node_id
            yield name

    def pull(names: Iterable[str]) -> Iterable[Message]:
        return answer([n for n in names if asked[n] != 1000 or time.monotonic() > ready])

    monkeypatch.setattr(grid, "push_messages", push)
    monkeypatch.setattr(grid, "pull_messages", pull)
    (done,) = feddm(c).run(grid)
    assert (done.clients_ok, done.connected) == (4, 4)
    assert "waiting for 1 nodes that are connected: they may be reading their images" in caplog.messages


def test_a_node_that_is_one_reply_behind_introduces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a SuperNode may be that has a reply left over from before its SuperLink was restarted."""
    monkeypatch.setattr(liveness, "_FIRST", 0.3)
    c = config(num_server_rounds=1, wait_timeout=20.0)
    grid, asked = LocalGrid(nodes(c)), list[str]()
    push, pull = grid.push_messages, grid.pull_messages

    def pushed(messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            (name,) = push([message])
            if message.metadata.dst_node_id == 1000 and message.metadata.message_type == "query":
                asked.append(name)
            yield name

    monkeypatch.setattr(grid, "push_messages", pushed)
    monkeypatch.setattr(grid, "pull_messages", lambda names: pull([n for n in names if n not in asked[-1:]]))
    (done,) = feddm(c).run(grid)
    assert (done.clients_ok, len(asked)) == (4, 2)


def test_a_run_that_begins_without_a_node_that_does_not_answer_says_so(caplog: pytest.LogCaptureFixture) -> None:
    c = config(wait_timeout=0.5, num_server_rounds=1)
    (done,) = run(c, {**nodes(c), 1: lambda m: None})
    assert (done.clients_ok, done.connected) == (4, 5)
    assert "the round begins without 1 nodes that are connected but do not answer" in caplog.messages


def test_a_share_of_the_nodes_trains_and_a_repeated_round_draws_others() -> None:
    c = config(fraction_train=0.5, num_server_rounds=3)
    assert [r.clients_ok for r in run(c)] == [2, 2, 2]
    first = feddm(c)._sample([f"node-{i}" for i in range(10)], 1, 0)
    assert feddm(c)._sample([f"node-{i}" for i in range(10)], 1, 1) != first


def test_sampling_takes_a_share_by_name_and_seed() -> None:
    c = config(fraction_train=0.5)
    names = [f"node-{i}" for i in range(10)]
    chosen = [feddm(c)._sample(names, r, 0) for r in range(20)]
    assert all(len(set(s)) == 5 for s in chosen)
    assert chosen == [feddm(c)._sample(names, r, 0) for r in range(20)]
    assert len({tuple(s) for s in chosen}) > 10


def test_a_held_out_loss_of_no_images_counts_nothing() -> None:
    def lie(message: Message, reply: Message) -> Message:
        reply.content.config_records["report"]["eval-loss"] = 1.0
        return reply

    c = config(data__eval_fraction=0.0)
    (first, _) = run(c, {i: on_train(handle, lie) for i, handle in nodes(c).items()})
    assert first.clients_ok == 4
    assert np.isnan(first.eval_loss)


def test_ema_and_evaluation_are_reported() -> None:
    rounds = run(config(num_server_rounds=4, eval__every=2))
    assert [np.isfinite(r.eval_loss) for r in rounds] == [True, False, True, True]
    assert rounds[-1].eval_loss < rounds[0].eval_loss
    assert rounds[-1].ema.tobytes() != rounds[-1].weights.tobytes()
    assert [r.local_steps for r in rounds] == [12, 12, 12, 12]
