"""Exchanging only parts of the model, with any codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from local_grid import Handler, LocalGrid, config, feddm, nodes, on_train, run

from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.exchange.channel import channel
from feddm_flwr.exchange.partial import Split, assign, split_of
from feddm_flwr.models import networks, parameters
from feddm_flwr.storage.state_folder import state_root
from feddm_flwr.vector import Layout, Vector

SCHEMES: list[dict[str, Any]] = [
    {},
    {"exchange__parts": "usplit"},
    {"exchange__parts": "ulatdec"},
    {"exchange__parts": "udec"},
    {"exchange__personal": "conv_in.*, *.bias"},
    {"exchange__parts": "usplit", "exchange__personal": "*norm*"},
]


def quick(**keys: Any) -> RunConfig:
    return config(**{"eval__every": 0, "train__local_steps": 2, "train__batch_size": 4, **keys})


def parts(c: RunConfig) -> tuple[Split, Layout]:
    layout = parameters.layout(networks.build(c, {}))
    return split_of(layout, c), layout


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_parameter_is_in_exactly_one_place_and_comes_back_to_it(scheme: dict[str, Any]) -> None:
    found, layout = parts(quick(**scheme))
    assert sorted(found.shared.layout.names + found.personal.layout.names) == sorted(layout.names)
    vector = np.arange(layout.size, dtype=np.float32)
    rebuilt = np.full_like(vector, -1)
    shared = np.full(found.shared.layout.size, -1, np.float32)
    for part in found.sent.values():
        part.put(part.take(found.shared.take(vector)), shared)
    found.shared.put(shared, rebuilt)
    found.personal.put(found.personal.take(vector), rebuilt)
    np.testing.assert_array_equal(rebuilt, vector)


def test_the_schemes_keep_and_split_what_they_say() -> None:
    def first(names: tuple[str, ...]) -> set[str]:
        return {name.split(".")[0] for name in names}

    full, layout = parts(quick())
    assert full.personal.layout.names == ()
    assert full.shared.layout.fingerprint == layout.fingerprint
    assert full.shared.slices == full.sent["all"].slices == (slice(0, layout.size),)
    encoder, embedding = {"conv_in", "down_blocks"}, {"time_embedding"}
    decoder = {"up_blocks", "conv_norm_out", "conv_out"} | embedding
    for scheme, kept in (("ulatdec", encoder), ("udec", encoder | {"mid_block"})):
        found, _ = parts(quick(exchange__parts=scheme))
        assert first(found.personal.layout.names) == kept
        assert first(found.shared.layout.names) >= decoder
    split, _ = parts(quick(exchange__parts="usplit"))
    assert first(split.sent["encoder"].layout.names) == encoder
    assert first(split.sent["rest"].layout.names) == decoder | {"mid_block"}


def test_halves_are_shared_out_evenly_and_in_turns() -> None:
    c = quick(exchange__parts="usplit")
    found, _ = parts(c)
    names = [f"node-{i}" for i in range(5)]
    rounds = [assign(found, names, c, number) for number in range(1, 30)]
    assert {tuple(sorted(r.values())) for r in rounds} == {
        ("encoder",) * 3 + ("rest",) * 2,
        ("encoder",) * 2 + ("rest",) * 3,
    }
    assert {assign(found, names[:1], c, number)["node-0"] for number in (1, 2)} == {"encoder", "rest"}
    assert all({r[name] for r in rounds} == {"encoder", "rest"} for name in names)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"exchange__personal": "conv_in.*,nothing.*"}, "'nothing.*' matches no parameter; there are"),
        ({"exchange__personal": "*"}, "no parameter would be exchanged"),
        ({"exchange__personal": "down_blocks.*,conv_in.*", "exchange__parts": "usplit"}, "nothing to split"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"exchange\.personal") as error:
        parts(quick(**keys))
    assert message in str(error.value)


def test_weights_are_summed_for_each_part_over_the_nodes_that_sent_it() -> None:
    c = quick(strategy="feddm-quant", codec__uplink="int8", codec__downlink="none", exchange__parts="usplit",
              num_server_rounds=1, data__partition="dirichlet")  # fmt: skip
    found, _ = parts(c)
    sent: dict[str, tuple[str, Vector]] = {}

    def record(message: Message, reply: Message) -> Message:
        part = str(message.content.config_records["task"]["part"])
        layout = found.sent[part].layout
        frame = reply.content.array_records["weights"]["frame"].data
        delta = channel("int8", c.codec, layout.fingerprint, layout.size).decode(frame, "delta", 1)
        sent[str(reply.content.config_records["report"]["name"])] = part, delta
        return reply

    server = feddm(c)
    start = found.shared.take(parameters.to_vector(networks.build(c, {})))
    (done,) = server.run(LocalGrid({i: on_train(h, record) for i, h in nodes(c).items()}))
    images = {node.name: node.images for node in server.nodes}
    assert server.never_sent == set()
    for name, part in found.sent.items():
        senders = [n for n in sent if sent[n][0] == name]
        assert len(senders) == 2
        mean = np.average(
            [sent[n][1].astype(np.float64) for n in senders], axis=0, weights=[images[n] for n in senders]
        )
        np.testing.assert_allclose(part.take(done.weights - start), mean, atol=1e-6)


@pytest.mark.parametrize("scheme", [{"exchange__parts": "udec"}, {"exchange__personal": "conv_in.*"}], ids=str)
def test_personal_parameters_stay_on_the_node_whose_own_model_loads_with_diffusers(scheme: dict[str, Any]) -> None:
    from diffusers import DDPMPipeline

    c = quick(strategy="feddm-quant", codec__uplink="int2", codec__downlink="int2", num_server_rounds=3, **scheme)
    found, layout = parts(c)
    rounds = run(c)
    assert rounds[-1].bytes_up_fp32 == 4 * 4 * found.shared.layout.size
    assert rounds[-1].weights.shape == (found.shared.layout.size,)
    own: list[Vector] = []
    for path in sorted(state_root(None).glob("*/*/pipeline")):
        unet = DDPMPipeline.from_pretrained(path).unet
        assert parameters.layout(unet) == layout
        own.append(found.personal.take(parameters.to_vector(unet)))
    assert len(own) == 4
    initial = found.personal.take(parameters.to_vector(networks.build(c, {})))
    assert len({v.tobytes() for v in [*own, initial]}) == 5  # each trained, each its own
    assert rounds[-1].weights.tobytes() == run(c)[-1].weights.tobytes()


def test_what_a_node_learnt_in_vain_is_forgotten_in_its_personal_parameters_too() -> None:
    c = quick(exchange__parts="udec", num_server_rounds=3)

    def lost(handle: Handler, trains: bool) -> Handler:
        def changed(message: Message) -> Message | None:
            task = message.content.config_records.get("task")
            if not task or task["round"] != 2:
                return handle(message)
            if trains:
                handle(message)
            return Message(Error(2, "lost"), reply_to=message)

        return changed

    def finish(trains: bool) -> bytes:
        handlers = nodes(c)
        return run(c, {**handlers, 997: lost(handlers[997], trains)})[-1].weights.tobytes()

    assert finish(True) == finish(False)


def test_a_node_that_lost_its_personal_parameters_begins_anew_and_says_so() -> None:
    c = quick(exchange__parts="udec", num_server_rounds=3)

    def deleting(handle: Handler) -> Handler:
        def changed(message: Message) -> Message | None:
            task = message.content.config_records.get("task")
            if task and task["round"] == 3:
                (path,) = state_root(None).glob("*/node-3/personal-2.frame")
                path.unlink()
            return handle(message)

        return changed

    handlers = nodes(c)
    rounds = run(c, {**handlers, 997: deleting(handlers[997])})
    assert [r.state_lost for r in rounds] == [0, 0, 1]
    assert [r.clients_ok for r in rounds] == [4, 4, 4]


def test_the_diffusers_u_net_has_the_parts_that_the_schemes_name() -> None:
    """A wider model than the tests': names begin with one of those that the schemes know."""
    names = parameters.layout(
        networks.build(quick(model__block_channels="16,32,32", model__attention="0,1,1"), {})
    ).names
    known = ("conv_in.", "down_blocks.", "mid_block.", "up_blocks.", "conv_norm_out.", "conv_out.", "time_embedding.")
    assert all(name.startswith(known) for name in names)
