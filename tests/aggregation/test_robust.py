"""Robust rules and the judgement of norms: what a few bad nodes can do, and that good ones lose nothing."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, config, feddm, nodes, on_query, on_train, run
from numpy.typing import NDArray

from feddm_flwr.aggregation.outliers import Outliers
from feddm_flwr.aggregation.robust import RobustMean
from feddm_flwr.codecs import framing
from feddm_flwr.config import RunConfig
from feddm_flwr.exchange.channel import Channel, channel

SIZE = framing.CHUNK + 3  # two chunks


def coded(codec: str, size: int) -> Channel:
    return channel(codec, OPTIONS, "layout", size)


OPTIONS = config(strategy="feddm-lean").codec


def robust(updates: NDArray[np.float32], trim: float, codec: str = "none", scale: float = 1.0) -> NDArray[np.float32]:
    size = updates.shape[1]
    up = coded(codec, size)
    with tempfile.TemporaryDirectory() as folder:
        mean = RobustMean(size, trim, lambda frame: up.decode_chunks(frame, "delta", 1), Path(folder))
        for update in updates:
            mean.add(update, 1, up.encode(update, "delta", 1), scale)
        assert mean.count == len(updates)
        assert list(Path(folder).iterdir()) == []  # a run that is killed leaves nothing behind
        return mean.mean()


@given(st.integers(1, 9), st.sampled_from([0.1, 0.2, 0.4]), st.integers(0, 2**32))
def test_the_rules_are_those_of_the_textbook(count: int, trim: float, seed: int) -> None:
    updates = np.random.default_rng(seed).normal(size=(count, 20)).astype(np.float32)
    np.testing.assert_allclose(robust(updates, 0.5), np.median(updates, axis=0), rtol=1e-6, atol=1e-7)
    dropped = min(max(1, math.floor(trim * count)), (count - 1) // 2)
    expected = np.sort(updates, axis=0)[dropped : count - dropped].mean(axis=0)
    np.testing.assert_allclose(robust(updates, trim), expected, rtol=1e-5, atol=1e-6)
    shuffled = np.random.default_rng(seed + 1).permutation(updates)
    assert robust(updates, trim).tobytes() == robust(shuffled, trim).tobytes()


@pytest.mark.parametrize("codec", ["none", "int8", "int2"])
def test_frames_of_many_chunks_are_decoded_chunk_by_chunk(codec: str) -> None:
    updates = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)
    up = coded(codec, SIZE)
    decoded = [up.decode(up.encode(update, "delta", 1), "delta", 1) for update in updates]
    expected = np.median(0.5 * np.stack(decoded), axis=0)
    np.testing.assert_array_equal(robust(updates, 0.5, codec, scale=0.5), expected.astype(np.float32))


def test_one_hostile_node_cannot_move_the_median_out_of_the_others_range() -> None:
    honest = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)
    for lie in (1e20, -1e20, 0.0):
        result = robust(np.vstack([honest, np.full((1, 100), lie, np.float32)]), 0.5)
        assert (result >= honest.min(axis=0)).all()
        assert (result <= honest.max(axis=0)).all()


def test_the_trimmed_mean_of_few_replies_stands_one_liar_too() -> None:
    honest = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    result = robust(np.vstack([honest, np.full((1, 100), 1e20, np.float32)]), trim=0.2)
    assert (result <= honest.max(axis=0)).all()


def test_the_replies_of_a_large_federation_take_one_file(tmp_path: Path) -> None:
    up, update = coded("int8", 10), np.ones(10, np.float32)
    mean = RobustMean(10, 0.5, lambda frame: up.decode_chunks(frame, "delta", 1), tmp_path)
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(2000):  # systems allow a process 1,024 open files
        mean.add(update, 1, up.encode(update, "delta", 1), 1.0)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    np.testing.assert_array_equal(mean.mean(), up.decode(up.encode(update, "delta", 1), "delta", 1))


def test_under_a_robust_rule_no_node_decides_alone_how_far_the_run_is(tmp_path: Path) -> None:
    keys = {"train__local_epochs": 1, "train__local_steps": 0, "train__batch_size": 64, "num_server_rounds": 1}
    c = config(server__aggregation="median", out_dir=str(tmp_path), **keys)
    handlers = nodes(c)

    def many(message: Message, reply: Message) -> Message:
        reply.content.config_records["report"].update({"images": 800_000, "steps": 12_500})
        return reply

    last = min(handlers)
    claims = on_query(on_train(handlers[last], many), images=800_000)
    server = feddm(c)
    (done,) = server.run(LocalGrid(handlers | {last: claims}))
    assert done.clients_ok == 4
    assert server.checkpoint().facts["steps"] < 1000


def test_norms_are_judged_by_earlier_rounds_only() -> None:
    outliers = Outliers(limit=10.0, clip=2.0)
    one = np.ones(100, np.float32)  # norm 10
    assert outliers.check("all", one) == (10.0, 1.0)
    with pytest.raises(ValueError, match="norm 20: in the first round at most 10, 1 for a parameter"):
        outliers.check("all", 2 * one)
    outliers.commit({"all": [(1.0, 1), (2.0, 1), (9.0, 1)]})
    assert outliers.check("all", one) == (10.0, 0.4)
    with pytest.raises(ValueError, match=r"norm 30: more than server.norm-limit = 10 times the median of 2 in earlier"):
        outliers.check("all", 3 * one)
    assert outliers.check("encoder", one) == (10.0, 1.0)  # each part has norms of its own
    assert outliers.check("all", 3 * one, steps=3) == (30.0, 0.4)  # more steps go further
    again = Outliers(10.0, 2.0)
    again.restore(outliers.state())
    assert again.check("all", one) == (10.0, 0.4)
    for _ in range(5):
        outliers.commit({"all": [(100.0, 1)]})
    assert outliers.check("all", 3 * one) == (30.0, 1.0)  # rounds long past do not count
    assert Outliers(0.0, 0.0).check("all", 1000 * one) == (10000.0, 1.0)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_nodes_of_few_steps_and_of_many_are_taken_as_they_are(power: float) -> None:
    """Whether an update grows with its steps or with their root."""
    outliers = Outliers(limit=2.0, clip=1.5)
    lengths = [(steps**power, steps) for steps in (1, 5, 300, 320, 350)]
    outliers.commit({"all": lengths})
    for norm, steps in lengths:
        update = np.zeros(4, np.float32)
        update[0] = norm
        assert outliers.check("all", update, steps) == (pytest.approx(norm), 1.0)
    update[0] = 10 * 300 * 4
    with pytest.raises(ValueError, match=r"more than server\.norm-limit = 2 times"):
        outliers.check("all", update, 10**6)  # it says so


def liar(c: RunConfig, factor: float, first: int) -> dict[int, object]:
    """Four nodes, one of which sends `factor` times its update from round `first` on."""
    up = channel(c.codec.uplink, c.codec, "", 1)

    def lie(message: Message, reply: Message) -> Message:
        number = int(message.content.config_records["task"]["round"])
        if number >= first:
            array = reply.content.array_records["weights"]["frame"]
            header, _ = framing.read_header(array.data)
            exact = Channel(up.codec, header.layout, header.size)
            array.data = exact.encode(factor * exact.decode(array.data, "delta", number), "delta", number)
        return reply

    handlers = nodes(c)
    last = min(handlers)
    return handlers | {last: on_train(handlers[last], lie)}


def test_an_update_that_is_far_too_long_is_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    c = config(num_server_rounds=3, strategy="feddm-prox", codec__uplink="fp16", codec__target="delta")
    rounds = run(c, liar(c, 50.0, first=2))  # type: ignore[arg-type]
    assert [one.failures for one in rounds] == [{}, {"outlier": 1}, {"outlier": 1}]
    assert [one.clients_ok for one in rounds] == [4, 3, 3]
    assert "node=node-3 dropped: outlier: norm" in caplog.text


def test_the_median_stands_what_ruins_the_mean(tmp_path: Path) -> None:
    keys = {"strategy": "feddm-prox", "codec__uplink": "fp16", "codec__target": "delta", "server__norm_limit": 0.0}
    goal = run(config(**keys))[-1].weights
    moved = {}
    for rule in ("mean", "median", "trimmed-mean"):
        share = {"server__trim_share": 0.25} if rule == "trimmed-mean" else {}
        c = config(**keys, **share, server__aggregation=rule, out_dir=str(tmp_path))
        moved[rule] = float(np.linalg.norm(run(c, liar(c, -100.0, first=1))[-1].weights - goal))  # type: ignore[arg-type]
    assert moved["median"] < moved["mean"] / 20
    assert moved["trimmed-mean"] < moved["mean"] / 20
