"""The round loop against nodes that answer late, wrongly, or not at all. Runs through Flower itself are
in `test_app.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from local_grid import (
    config,
    failing,
    feddm,
    introductions,
    nodes,
    on_train,
    run,
    weights_without_node_3,
)

from feddm_flwr.config import RunConfig
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.server.round import RoundInProgress, RoundResult


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


@pytest.mark.parametrize(("strategy", "weights"), [("feddm-vanilla", "equal"), ("feddm-quant", "images")])
def test_under_averaging_the_model_is_the_mean_of_what_the_nodes_sent(strategy: str, weights: str) -> None:
    c = config(strategy=strategy, num_server_rounds=1, data__partition="dirichlet", server__weights=weights)
    (done,), sent = frames(c)
    server = feddm(c)
    images = {node.name: node.images for node in introductions(c).values()}
    mean = np.average(
        [server._receiver._channels["all"].decode(frame, "weights", 1).astype(np.float64) for _, frame in sorted(sent)],
        axis=0,
        weights=[images[name] if weights == "images" else 1 for name, _ in sorted(sent)],
    )
    np.testing.assert_allclose(done.weights, mean, rtol=1e-5, atol=1e-7)
    assert done.clients_ok == 4
    assert done.bytes_up == sum(len(frame) for _, frame in sent)


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
        lambda m, r: with_frame(r, a_frame(config(model__block_channels="16"), 1.0), m),
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
    assert done.weights.tobytes() == weights_without_node_3(C)


def test_a_round_with_too_few_replies_is_repeated_and_its_bytes_are_counted() -> None:
    c = config(num_server_rounds=1, max_round_retries=1)
    (done,) = run(c, failing(C, 3, 1))
    (undisturbed,) = run(c)
    assert done.weights.tobytes() == undisturbed.weights.tobytes()
    assert done.bytes_down == 2 * undisturbed.bytes_down
    assert done.bytes_up > undisturbed.bytes_up


def test_no_attempt_at_a_round_outlives_it() -> None:
    """Each holds weights and sums as large as the model."""
    c = config(max_round_retries=1)
    alive: list[int] = []

    def count(message: Message, reply: Message) -> Message:
        alive.append(sum(isinstance(o, RoundInProgress) for o in gc.get_objects()))
        return reply

    gc.collect()
    run(c, {i: on_train(h, count) for i, h in failing(c, 3, 1).items()})
    assert len(alive) == 4 * (c.num_server_rounds + 1)  # the first is repeated
    assert {*alive} == {1}


@pytest.mark.parametrize("broken", [2, 4])
def test_a_run_with_too_few_replies_fails_loudly(broken: int) -> None:
    with pytest.raises(
        RunFailedError, match=f"{4 - broken} of 4 nodes gave a good reply, 3 are needed .{broken} exception"
    ):
        run(config(max_round_retries=1), failing(C, broken, 99))


def test_a_reply_that_names_one_frame_often_is_counted_once() -> None:
    def repeat(message: Message, reply: Message) -> Message:
        weights = reply.content.array_records["weights"]
        for i in range(100):
            reply.content[f"weights-{i}"] = weights
        return reply

    c = config(num_server_rounds=1)
    (honest,), (repeated,) = run(c), run(c, {i: on_train(handle, repeat) for i, handle in nodes(c).items()})
    assert repeated.bytes_up == honest.bytes_up


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


def test_evaluations_are_reported() -> None:
    rounds = run(config(num_server_rounds=4, eval__every=2))
    assert [np.isfinite(r.eval_loss) for r in rounds] == [True, False, True, True]
    assert rounds[-1].eval_loss < rounds[0].eval_loss
    assert [r.local_steps for r in rounds] == [8, 8, 8, 8]
