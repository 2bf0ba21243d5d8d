"""Who takes part: introductions, names, restarts, and waiting for nodes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from local_grid import (
    Handler,
    LocalGrid,
    config,
    feddm,
    introductions,
    node,
    nodes,
    on_query,
    run,
    weights_without_node_3,
)

from feddm_flwr.client_app import app
from feddm_flwr.config import ConfigError, flatten
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.server.federation import liveness
from feddm_flwr.server.federation.roster import Roster
from feddm_flwr.server.round import RoundResult

C = config(num_server_rounds=1)


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
        Roster(config(min_nodes=4)).wait(grid, first=True)
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
    assert done.weights.tobytes() == weights_without_node_3(C)


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


@pytest.mark.parametrize(
    "problem",
    ["data-path = '/data': 1 images are too few", "data-path = '/data': no images below this folder", "a\nb"],
)
def test_a_new_run_begins_without_a_node_that_finds_something_wrong(
    problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad node costs its reply, never the run, unless `min-nodes` says that all must be there."""
    handlers = nodes(C)
    handlers[997] = on_query(handlers[997], problem=problem)
    roster = Roster(C)
    assert sorted(roster.wait(LocalGrid(handlers), first=True)) == ["node-0", "node-1", "node-2"]
    said = [f"the run begins without node-3: {line}" for line in problem.splitlines()]
    assert caplog.messages == said
    assert len(roster.wait(LocalGrid(handlers), first=False)) == 3
    assert caplog.messages == said
    with pytest.raises(ConfigError, match=f"node-3: {problem.splitlines()[0]}"):
        Roster(config(min_nodes=4)).wait(LocalGrid(handlers), first=True)


def test_what_a_node_remarks_on_its_images_is_said(caplog: pytest.LogCaptureFixture) -> None:
    handlers = nodes(C)
    handlers[997] = on_query(handlers[997], remarks='{"images nearly all black": 20, "files passed over, .heic": 3}')
    handlers[998] = on_query(handlers[998], remarks="[" * 100_000)
    roster = Roster(C)
    assert len(roster.wait(LocalGrid(handlers), first=True)) == 3
    assert "node node-3: images nearly all black: 20" in caplog.messages
    assert "node node-3: files passed over, .heic: 3" in caplog.messages
    assert roster.nodes["node-3"].remarks == {"images nearly all black": 20, "files passed over, .heic": 3}


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
    c = config(wait_timeout=1.0, min_nodes=5)
    wrong = node(c, 0, **{"node-name": "a b"})
    with pytest.raises(ConfigError, match="unnamed: node-name = 'a b' is not allowed"):
        run(c, {**nodes(c), 1: wrong, 2: lambda m: None})


def test_a_run_that_is_resumed_does_not_wait_for_a_node_that_finds_something_wrong(
    caplog: pytest.LogCaptureFixture,
) -> None:
    c = config(wait_timeout=600.0)
    roster = Roster(c)
    roster.expect([*introductions(c).values()])
    handlers = nodes(c)
    handlers[997] = on_query(handlers[997], problem="data-path = '/data': no such folder")
    assert len(roster.wait(LocalGrid(handlers), first=True)) == 3
    assert "left out: node-3: data-path = '/data': no such folder" in caplog.messages


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
