"""Checkpoints are whole or absent, and a run that goes on from one has the bits of one that never stopped."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, config, feddm, nodes, on_train, run_server
from safetensors.numpy import load_file

from feddm_flwr.config import ConfigError, RunConfig, flatten
from feddm_flwr.config.resume import check_same_run
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.reporting.records import read_metrics, status_of
from feddm_flwr.server import run
from feddm_flwr.server.round import RoundResult
from feddm_flwr.storage import checkpoint
from feddm_flwr.storage.checkpoint import FORMAT, Checkpoint, NoCheckpointError, newest, save


def some(number: int, size: int = 1000) -> Checkpoint:
    random = np.random.default_rng(number)
    tensors = {
        "weights": random.normal(size=size).astype(np.float32),
        "frame": random.integers(0, 256, 77).astype(np.uint8),
        "empty": np.zeros(0, np.float32),
    }
    return Checkpoint(number, tensors, {"acked": [["north", "all", number]], "text": "ä\n"})


def test_a_checkpoint_is_read_as_it_was_written_and_is_a_safetensors_file(tmp_path: Path) -> None:
    path = save(tmp_path / "new", some(7), keep=1)
    read = newest(tmp_path / "new")
    assert read.round == 7
    assert read.facts["acked"] == [["north", "all", 7]]
    assert read.facts["text"] == "ä\n"
    for tensors in (read.tensors, load_file(path)):
        assert {name: (t.dtype, t.tobytes()) for name, t in tensors.items()} == {
            name: (t.dtype, t.tobytes()) for name, t in some(7).tensors.items()
        }


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    for number in (0, 1, 2, 9, 10, 100_000):
        save(tmp_path, some(number), keep=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-00009.safetensors", "round-00010.safetensors", "round-100000.safetensors"]
    assert newest(tmp_path).round == 100_000


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "absurd header": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "another software's": lambda content: content.replace(b'\\"format\\": 2', b'\\"format\\": 3'),
    "a round too new": lambda content: content.replace(b'\\"round\\": 2', b'\\"round\\": 3'),
}


@pytest.mark.parametrize("damage", [*DAMAGE])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, some(1), keep=2)
    path = save(tmp_path, some(2), keep=2)
    assert DAMAGE[damage](path.read_bytes()) != path.read_bytes()
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert newest(tmp_path).round == 1
    assert "round-00002.safetensors is of no use" in caplog.text


@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = save(folder, some(3, size=50), keep=1)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        read = newest(folder)
    except NoCheckpointError:
        return
    # JSON has bytes that mean nothing: white space may become other white space.
    assert read.facts == {"format": FORMAT, "round": 3, **some(3).facts}
    assert all(read.tensors[name].tobytes() == t.tobytes() for name, t in some(3, size=50).tensors.items())


def test_where_nothing_is_intact_the_run_does_not_start_from_scratch(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="empty"):
        newest(tmp_path)
    save(tmp_path, some(1), keep=1).write_bytes(b"no")
    with pytest.raises(NoCheckpointError, match="none of its 1 checkpoints is intact"):
        newest(tmp_path)


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: Any) -> None:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(content)


def test_a_checkpoint_is_written_beside_what_goes_on_and_what_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, whole = threading.Event(), checkpoint.whole_file

    @contextmanager
    def slow(path: Path) -> Iterator[BinaryIO]:
        assert go.wait(10)
        if path.name == "round-00002.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with whole(path) as file:
            yield file

    monkeypatch.setattr(checkpoint, "whole_file", slow)
    with checkpoint.Writer(tmp_path, keep=2) as writer:
        writer.begin(some(1))
        assert not list(tmp_path.iterdir())
        go.set()
        writer.wait()
        assert newest(tmp_path).round == 1
        writer.begin(some(2))
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
        writer.begin(some(3))
    assert newest(tmp_path).round == 3  # leaving waits


@pytest.mark.parametrize("room", [0, 500, 4000])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, some(1), keep=1)
    whole = checkpoint.whole_file

    @contextmanager
    def full(path: Path) -> Any:
        with whole(path) as file:
            yield FullDisk(file, room)

    monkeypatch.setattr(checkpoint, "whole_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, some(2), keep=1)
    assert newest(tmp_path).round == 1
    assert len(list(tmp_path.iterdir())) == 1


def train(
    c: RunConfig, folder: Path, stops: tuple[int, ...], *, late: bool = False, dropped: int = 0
) -> dict[int, tuple[RoundResult, dict[str, Any]]]:
    """A run that is killed in the round after each of `stops`, once its nodes have trained, and resumed from
    its checkpoint; where they are `late`, that of a round is not written before the next one's replies are in. One
    reply of the `dropped` round is of no use. Returns each round, and what its checkpoint had."""
    done: dict[int, tuple[RoundResult, dict[str, Any]]] = {}
    save(folder, feddm(c).checkpoint(), keep=2)

    class KilledError(BaseException):
        pass

    for stop in (*stops, None):
        server = feddm(c)
        server.restore(newest(folder))
        heard = 0

        def kill(message: Message, reply: Message, stop: int | None = stop) -> Message:
            nonlocal heard
            if message.content.config_records["task"]["round"] == (stop or -2) + 1:
                heard += 1
                if heard == 3:
                    raise KilledError
            report = reply.content.config_records["report"]
            if (report["round"], report["name"]) == (dropped, "node-1"):
                report["round"] = 99
            return reply

        handlers = {i: on_train(handle, kill) for i, handle in nodes(c).items()}
        pending: list[Checkpoint] = []

        def write(pending: list[Checkpoint] = pending) -> None:
            while pending:
                save(folder, pending.pop(), keep=2)

        try:
            for one in server.run(LocalGrid(handlers), write):
                pending.append(state := server.checkpoint())
                if not late:
                    write()
                done[one.round] = one, {name: tensor.tobytes() for name, tensor in state.tensors.items()}
        except KilledError:
            continue
    return done


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "feddm-vanilla", "server__optimizer": "adam"},
        {"strategy": "feddm-quant"},
        {"strategy": "feddm-lean"},
        {"strategy": "feddm-slow-link", "fraction_train": 0.75, "server__clip_norm": 1.0},
        {"strategy": "feddm-lean", "exchange__parts": "usplit"},
        {"strategy": "feddm-lean", "server__aggregation": "median"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(keys: dict[str, Any], tmp_path: Path) -> None:
    late = keys["strategy"] != "feddm-quant"  # the checkpoints of most; that of some comes in time
    c = config(num_server_rounds=4, out_dir=str(tmp_path), **keys)
    whole, resumed = train(c, tmp_path / "whole", ()), train(c, tmp_path / "resumed", (1, 2), late=late)
    assert [*resumed] == [1, 2, 3, 4]
    for number, (one, kept) in whole.items():
        assert kept == resumed[number][1]
        timeless = [{k: v for k, v in o.figures().items() if k != "seconds"} for o in (one, resumed[number][0])]
        assert json.dumps(timeless[0]) == json.dumps(timeless[1])  # NaN is not equal to itself


def test_the_folder_of_a_run_that_is_resumed_stays_whatever_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(message: Message, _: Message) -> Message:
        return Message(Error(2, "broken"), reply_to=message)

    c = config(run_name="kept", out_dir=str(tmp_path), max_round_retries=0, server__aggregation="median")
    with pytest.raises(RunFailedError, match="0 of 4 nodes gave a good reply, 3 are needed"):
        run_server(c, {i: on_train(handle, fail) for i, handle in nodes(c).items()})

    def wrong(*_: object) -> None:
        raise ConfigError("tracker = 'wandb': no service")

    monkeypatch.setattr("feddm_flwr.reporting.trackers.make", wrong)
    with pytest.raises(ConfigError, match="no service"):
        run_server(replace(c, resume=True))
    assert list((tmp_path / "kept" / "checkpoints").iterdir())


def test_a_node_whose_reply_was_dropped_still_has_what_the_last_durable_checkpoint_needs(tmp_path: Path) -> None:
    c = config(num_server_rounds=5, strategy="feddm-lean", exchange__personal="conv_in.*")
    whole = train(c, tmp_path / "whole", (), dropped=2)
    resumed = train(c, tmp_path / "resumed", (3,), late=True, dropped=2)
    assert [one.clients_failed for one, _ in whole.values()] == [0, 1, 0, 0, 0]
    assert [one.state_lost for one, _ in resumed.values()] == [0] * 5
    assert whole[5][1] == resumed[5][1]


def test_a_configuration_that_contradicts_the_checkpoint_is_refused_with_the_difference() -> None:
    before = flatten(config())
    check_same_run(config(run_name="x", resume=True, round_timeout=5.0, sample__every=0, keep_checkpoints=9), before, 1)
    with pytest.raises(ConfigError) as caught:
        check_same_run(config(seed=1, train__local_steps=9, num_server_rounds=7), before, 1)
    assert str(caught.value).splitlines() == [
        "num-server-rounds = 7: was 2 in the run to resume, and must stay so",
        "seed = 1: was 0 in the run to resume, and must stay so",
        "train.local-steps = 9: was 2 in the run to resume, and must stay so",
    ]
    check_same_run(config(num_server_rounds=1), before, 1)  # it ends there
    robust = config(server__aggregation="median", min_replies=3)
    check_same_run(robust, flatten(robust) | {"min-replies": 2}, 1)  # as was allowed once
    steady = {"train__lr_schedule": "constant"}
    check_same_run(config(num_server_rounds=7, **steady), flatten(config(**steady)), 2)
    with pytest.raises(ConfigError, match="num-server-rounds = 3: must be at least 5, which are done"):
        check_same_run(config(num_server_rounds=3, **steady), flatten(config(**steady)), 5)


def test_a_run_that_was_stopped_is_over_when_it_is_resumed_with_the_rounds_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(num_server_rounds=3, out_dir=str(tmp_path), run_name="early", sample__count=4, sample__steps=3)
    save = run._save

    def stopped(run: Any, feddm: Any, *rest: Any) -> None:
        if feddm.round == 2:
            raise KeyboardInterrupt
        save(run, feddm, *rest)

    monkeypatch.setattr(run, "_save", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_server(c)
    monkeypatch.setattr(run, "_save", save)
    assert (status_of(tmp_path / "early"), (tmp_path / "early" / "model").exists()) == ("failed", False)
    run_server(replace(c, resume=True, num_server_rounds=1))
    assert status_of(tmp_path / "early") == "completed"
    assert (tmp_path / "early" / "model" / "model_index.json").is_file()
    assert (tmp_path / "early" / "samples" / "round-0001.png").is_file()
    assert [row["round"] for row in read_metrics(tmp_path / "early")] == [1]


def test_a_wrong_configuration_leaves_the_name_of_the_run_free(tmp_path: Path) -> None:
    c = config(num_server_rounds=1, out_dir=str(tmp_path), run_name="x", sample__count=4, sample__steps=3)
    for wrong in (
        replace(c, model=replace(c.model, init_from=str(tmp_path / "nowhere"))),  # the server finds it
        replace(c, data=replace(c.data, partition="pathological", classes_per_node=11)),  # the nodes do
    ):
        with pytest.raises(ConfigError):
            run_server(wrong)
        assert not (tmp_path / "x").exists()
    run_server(c)


def test_a_checkpoint_of_a_version_with_fewer_keys_is_resumed(tmp_path: Path) -> None:
    before = {key: value for key, value in flatten(config()).items() if key != "server.clip-norm"}
    check_same_run(config(), before, 1)
    with pytest.raises(ConfigError, match=r"server.clip-norm = 2.0: was 0.0 in the run to resume"):
        check_same_run(config(server__clip_norm=2.0), before, 1)
