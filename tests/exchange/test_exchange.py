"""The exchange over rounds: error feedback, acknowledgements, the shadow, and state that goes missing."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from local_grid import AS_PRESET, Handler, LocalGrid, config, feddm, node, nodes, on_train, run

from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.config import CODECS, ConfigError, RunConfig
from feddm_flwr.exchange.channel import channel, exact, fingerprint
from feddm_flwr.exchange.node_state import NodeState, StateLostError
from feddm_flwr.models import networks, parameters
from feddm_flwr.server.round import RoundResult
from feddm_flwr.storage.state_folder import forget_run, state_root
from feddm_flwr.vector import Layout, Vector

RUN = "0123456789abcdef" * 2
LAYOUT = Layout(("weights",), ((1000,),))


def both(codec: str, **keys: Any) -> RunConfig:
    strategy = "feddm-vanilla" if codec == "none" else "feddm-quant"
    coded = {} if codec == "none" else {"codec__uplink": codec, "codec__downlink": codec}
    quick = {"eval__every": 0, "train__local_steps": 2, "train__batch_size": 4}
    return config(**{"strategy": strategy, "server__optimizer": "nesterov", **quick, **coded, **keys})


@cache
def undisturbed(c: RunConfig) -> list[RoundResult]:
    """The run without any fault."""
    return run(c)


def bits(rounds: list[RoundResult]) -> bytes:
    return rounds[-1].weights.tobytes()


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_a_run_repeated_has_the_same_bits_and_the_ratio_of_its_codec(codec: str) -> None:
    own: dict[str, dict[str, Any]] = {"topk": {"codec__topk_share": 0.1}, "budget": {"codec__budget_ratio": 20}}
    c = both(codec, codec__stochastic_rounding=codec == "int4", **AS_PRESET, **own.get(codec, {}))
    once, again = run(c), run(c)
    assert bits(once) == bits(again)
    assert [(r.train_loss, r.nodes, r.coding_error) for r in once] == [
        (r.train_loss, r.nodes, r.coding_error) for r in again
    ]
    least = {"fp16": 2, "bf16": 2.8, "int8": 3.9, "int4": 7.8, "int3": 12, "int2": 20, "sign": 29}
    least |= {"topk": 40, "budget": 16}
    assert once[-1].bytes_up_fp32 / once[-1].bytes_up >= least[codec]
    assert once[-1].bytes_down_fp32 / once[-1].bytes_down >= least[codec]
    assert all(r.bytes_full == r.state_lost == 0 for r in once)


def on_round(handle: Handler, number: int, act: Callable[[Handler, Message], Message | None]) -> Handler:
    """The node, with `act(handle, message)` in place of its training in round `number`."""

    def changed(message: Message) -> Message | None:
        task = message.content.config_records.get("task")
        return act(handle, message) if task and task["round"] == number else handle(message)

    return changed


def failed(message: Message) -> Message:
    return Message(Error(2, "broken"), reply_to=message)


def trained_in_vain(handle: Handler, message: Message) -> Message:
    """The node trains and keeps its state, but its reply is lost on the way."""
    handle(message)
    return failed(message)


def with_node_3(c: RunConfig, number: int, act: Callable[[Handler, Message], Message | None]) -> dict[int, Handler]:
    handlers = nodes(c)
    return {**handlers, 997: on_round(handlers[997], number, act)}


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_reply_that_was_lost_leaves_no_trace(attempts: int) -> None:
    """What the node did in a round that the server did not take in is as if it had not been: its residual
    is that of the last round that was acknowledged. So too where the round is repeated."""
    c = both("int2", num_server_rounds=4, max_round_retries=attempts - 1, min_replies=4 if attempts == 2 else 3)
    tries: list[int] = []

    def lost(handle: Handler, message: Message) -> Message | None:
        tries.append(1)
        return trained_in_vain(handle, message) if len(tries) == 1 else handle(message)

    def refused(handle: Handler, message: Message) -> Message | None:
        tries.append(1)
        return failed(message) if len(tries) == 1 else handle(message)

    in_vain = run(c, with_node_3(c, 2, lost))
    tries.clear()
    never_asked = run(c, with_node_3(c, 2, refused))
    assert bits(in_vain) == bits(never_asked)
    assert all(r.state_lost == 0 for r in in_vain)
    if attempts == 2:
        assert bits(in_vain) == bits(undisturbed(c))


def test_error_feedback_brings_a_coded_run_nearer_to_the_exact_one() -> None:
    keys: dict[str, Any] = {"num_server_rounds": 6, "server__optimizer": "averaging", "train__lr_schedule": "constant"}
    exact_run = run(both("none", **keys))
    distance = {}
    for feedback in (True, False):
        coded = run(both("topk", codec__downlink="none", codec__error_feedback=feedback, **keys))
        distance[feedback] = np.linalg.norm(coded[-1].weights - exact_run[-1].weights)
    assert distance[True] < distance[False]


def the_run_folder() -> Path:
    (folder,) = (p for p in state_root(None).iterdir() if (p / "node-3" / "residual-2.frame").exists())
    return folder


def flipped(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit flip": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "of another node": lambda path: shutil.copy(path.parent.parent / "node-2" / path.name, path),
    "of another round": lambda path: shutil.copy(path.with_name("residual-1.frame"), path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_residual_that_is_gone_or_wrong_is_noticed_and_the_run_goes_on(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    c = both("int2", num_server_rounds=4)
    expected = undisturbed(c)
    shutil.rmtree(state_root(None), ignore_errors=True)

    def hit(handle: Handler, message: Message) -> Message | None:
        DAMAGE[damage](the_run_folder() / "node-3" / "residual-2.frame")
        return handle(message)

    with caplog.at_level(logging.WARNING, "feddm"):
        rounds = run(c, with_node_3(c, 3, hit))
    assert [r.state_lost for r in rounds] == [0, 0, 1, 0]
    assert [r.clients_ok for r in rounds] == [4, 4, 4, 4]
    assert "node=node-3 had lost what it had kept" in caplog.text
    assert "it begins anew" in caplog.text
    assert rounds[-1].train_loss == pytest.approx(expected[-1].train_loss, rel=0.02)


def damage_shadow(how: str) -> None:
    folder = the_run_folder()
    shadows = sorted(folder.glob("shadow-*.frame"))
    assert len(shadows) == 2
    for path in shadows:
        if how == "deleted":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        else:  # whole, but not what it says
            number = int(path.name.split("-")[1])
            c = both("int2")
            layout = parameters.layout(networks.build(c, {}))
            vector = np.ones(layout.size, np.float32)
            path.write_bytes(exact(layout.fingerprint, layout.size).encode(vector, "shadow", number))


@pytest.mark.parametrize("how", ["deleted", "truncated", "of another run"])
def test_a_shadow_that_is_gone_or_wrong_is_sent_whole_and_the_bits_are_the_same(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    c = both("int2", num_server_rounds=4)
    expected = undisturbed(c)
    shutil.rmtree(state_root(None), ignore_errors=True)

    def hit(handle: Handler, message: Message) -> Message | None:
        if "shadow" not in message.content.array_records["weights"]:
            damage_shadow(how)
        return handle(message)

    with caplog.at_level(logging.WARNING, "feddm"):
        rounds = run(c, with_node_3(c, 3, hit))
    assert bits(rounds) == bits(expected)
    assert [r.bytes_full > 0 for r in rounds] == [False, False, True, False]
    assert rounds[2].bytes_down > rounds[2].bytes_full > 0.5 * rounds[2].bytes_down_fp32 / 4
    assert "node-3 has lost what it was sent before" in caplog.text
    assert rounds[2].bytes_down_fp32 == expected[2].bytes_down_fp32


def test_nodes_that_pause_get_the_frames_that_they_missed() -> None:
    c = both("int2", num_server_rounds=8, fraction_train=0.5, min_replies=2)
    rounds = run(c)
    assert sum(r.bytes_full for r in rounds) == 0
    assert sum(r.bytes_down_fp32 for r in rounds) / sum(r.bytes_down for r in rounds) > 12
    assert bits(rounds) == bits(run(c))


def test_a_node_that_comes_late_builds_on_the_initial_weights_or_gets_the_whole_where_that_is_smaller() -> None:
    for codec, whole in (("int2", False), ("fp16", True)):
        c = both(codec, num_server_rounds=5)
        handlers = nodes(c)
        late = handlers.pop(997)
        rounds = feddm(c).run(LocalGrid(handlers))
        done = [next(rounds) for _ in range(3)]
        handlers[997] = late
        while done[-1].round < 5:
            done.append(next(rounds))
        assert done[-1].clients_ok == 4
        assert (sum(r.bytes_full for r in done) > 0) == whole


def test_a_node_that_builds_other_initial_weights_gets_the_whole_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    c = both("int2")
    expected = undisturbed(c)
    server = feddm(c)
    monkeypatch.setattr("feddm_flwr.node.kept._kept", [])
    other = networks.build(config(seed=1), {})
    monkeypatch.setattr(networks, "build", lambda config, assets: other)
    rounds = list(server.run(LocalGrid(nodes(c))))
    assert bits(rounds) == bits(expected)
    assert rounds[0].bytes_full > 0


def test_the_paper_s_scheme_leaves_nothing_of_a_run_on_a_node() -> None:
    run(config(strategy="feddm-quant"))
    assert [path.name for path in state_root(None).iterdir()] == ["cache"]  # its own images, decoded


def test_the_server_s_model_follows_its_optimizer_while_the_nodes_follow_the_shadow() -> None:
    """The model moves by the mean of what arrived; what the downlink loses is owed, not forgotten."""
    c = both("int2", num_server_rounds=3)
    strategy = feddm(c)
    layout = parameters.layout(networks.build(c, {}))
    up = channel("int2", c.codec, layout.fingerprint, layout.size)
    optimizer = server_optimizer("nesterov", c.server.learning_rate, c.server.momentum)
    weights = parameters.to_vector(networks.build(c, {}))
    state = optimizer.init(weights)
    sent: dict[int, list[Vector]] = {}

    def record(message: Message, reply: Message) -> Message:
        number = int(str(message.content.config_records["task"]["round"]))
        frame = reply.content.array_records["weights"]["frame"].data
        sent.setdefault(number, []).append(up.decode(frame, "delta", number))
        return reply

    handlers = {i: on_train(h, record) for i, h in nodes(c).items()}
    for done in strategy.run(LocalGrid(handlers)):
        shares = np.array([strategy.nodes[i].images for i in range(4)], np.float64)
        # Handlers answer in the order of their names: node-0 first.
        mean = np.average(np.array(sent[done.round], np.float64), axis=0, weights=shares).astype(np.float32)
        weights, state = optimizer.update(weights, mean, state)
        np.testing.assert_allclose(done.weights, weights, atol=1e-6)


def vector(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(1000).astype(np.float32)


def test_state_is_read_as_it_was_written_and_only_by_its_owner(tmp_path: Path) -> None:
    own = NodeState(tmp_path, RUN, "a")
    own.write("residual", 3, vector(0), LAYOUT, still=())
    assert own.read("residual", 3, LAYOUT).tobytes() == vector(0).tobytes()
    other_name, other_size = Layout(("other",), ((1000,),)), Layout(("weights",), ((999,),))
    for wrong in ((3, other_name), (3, other_size), (4, LAYOUT)):
        with pytest.raises(StateLostError, match="residual-"):
            own.read("residual", *wrong)
    other = NodeState(tmp_path, RUN, "b")
    shutil.copy(own.path / "residual-3.frame", other.path)
    with pytest.raises(StateLostError, match="the frame's layout is"):
        other.read("residual", 3, LAYOUT)


def test_residuals_since_the_acknowledged_round_are_kept(tmp_path: Path) -> None:
    state = NodeState(tmp_path, RUN, "a")
    for number, still, kept in (
        (1, (0, 0), {1}),
        (2, (1, 0), {1, 2}),
        (4, (1, 1), {1, 2, 4}),
        (5, (4, 1), {1, 2, 4, 5}),
        (6, (4, 4), {4, 5, 6}),
        (8, (4, 4), {4, 5, 6, 8}),
        (9, (8, 4), {4, 6, 8, 9}),
    ):
        state.write("residual", number, vector(number), LAYOUT, still)
        assert {path.name for path in state.path.iterdir()} == {f"residual-{n}.frame" for n in kept}
    state.write("residual", 7, vector(7), LAYOUT, (8, 4))  # a job that was overtaken
    assert {path.name for path in state.path.iterdir()} == {f"residual-{n}.frame" for n in (4, 6, 7, 8, 9)}


def test_a_run_uuid_is_never_a_path(tmp_path: Path) -> None:
    for hostile in ("../../etc", "", "a" * 31, "A" * 32):
        with pytest.raises(ValueError, match="is not 32 hex digits"):
            NodeState(tmp_path, hostile, "a")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_nobody_touched_for_two_weeks_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    old, recent = "1" * 32, "2" * 32
    for run_uuid in (old, recent):
        NodeState(tmp_path, run_uuid, "a").write("residual", 1, vector(0), LAYOUT, ())
    (tmp_path / "notes").mkdir()
    long_ago = time.time() - 15 * 24 * 3600
    for path in (tmp_path / old, tmp_path / old / "a", tmp_path / "notes"):
        os.utime(path, (long_ago, long_ago))
    NodeState(tmp_path, RUN, "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([RUN, recent, "notes"])
    forget_run(tmp_path, recent)
    assert not (tmp_path / recent).exists()


def test_the_state_folder_is_the_node_s_own_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_root(str(tmp_path)) == tmp_path
    assert state_root(None) == Path(os.environ["XDG_STATE_HOME"]) / "feddm"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_root(None) == Path.home() / ".local" / "state" / "feddm"
    c = both("int2", num_server_rounds=1)
    run(c, {i: node(c, i, **{"state-path": str(tmp_path / f"site-{i}")}) for i in range(4)})
    assert {p.name for p in tmp_path.iterdir()} == {f"site-{i}" for i in range(4)}


def test_a_state_folder_that_cannot_be_written_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = {"state-path": str(tmp_path / "file" / "x")}
    with pytest.raises(
        ConfigError, match=r"state-path = '.*file/x': decoded images cannot be kept there \(.*Not a directory"
    ):
        run(both("int2"), {i: node(both("int2"), i, **path) for i in range(4)})


def test_a_fingerprint_tells_every_bit() -> None:
    values = vector(0)
    other = values.copy()
    other.view(np.uint32)[500] ^= 1
    assert fingerprint(values) == fingerprint(values.copy()) != fingerprint(other)
