"""Short rounds at the end of a run: what nodes do in them, what is forgotten before them, and resume across."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from local_grid import LocalGrid, config, feddm, nodes, on_train, run, run_server

from feddm_flwr.config import ConfigError, flatten, parse
from feddm_flwr.config.resume import check_same_run
from feddm_flwr.exchange.channel import exact
from feddm_flwr.storage.checkpoint import newest
from feddm_flwr.training.loop import Progress, learning_rate

LEAN: dict[str, Any] = {"strategy": "feddm-lean", "train__moments": "server"}
FINISH: dict[str, Any] = {"num_server_rounds": 5, "finish__rounds": 3, "finish__local_steps": 2}


def test_it_leaves_the_rounds_before_as_they_are_and_has_its_own_after() -> None:
    keys = {"train__optimizer": "muon", "train__moments": "server", "train__local_steps": 3}
    whole, alone = run(config(**keys, **FINISH)), run(config(**keys))
    assert [done.weights.tobytes() for done in whole[:2]] == [done.weights.tobytes() for done in alone]
    assert [done.local_steps for done in whole] == [4 * 3, 4 * 3, 4 * 2, 4 * 2, 4 * 2]
    up = [done.bytes_up for done in whole]
    assert up[4] == pytest.approx(up[1], rel=1e-3)  # the model alone: nothing goes on with more
    assert up[3] == pytest.approx(up[2], rel=1e-3)  # and second moments
    assert 1.001 * up[1] < up[2] < 0.99 * up[0]  # and Muon's momentum


@pytest.mark.parametrize(
    "keys",
    [
        LEAN,
        {"train__moments": "node", "train__alignment": 0.5, "server__aggregation": "median"},
        {"train__control": "scaffold", "train__lr_schedule": "constant"},
    ],
)
def test_it_is_resumed_to_the_same_bits_from_every_round(keys: dict[str, Any], tmp_path: Path) -> None:
    c = config(**keys, **FINISH | {"finish__rounds": 2, "num_server_rounds": 4}, out_dir=str(tmp_path))
    server = feddm(c)
    rounds = server.run(LocalGrid(nodes(c)))
    next(rounds)
    before = copy.deepcopy(server.checkpoint())
    for done in rounds:
        other = feddm(c)
        other.restore(before)
        before = copy.deepcopy(server.checkpoint())
        again = next(other.run(LocalGrid(nodes(c), backwards=True)))
        assert again.weights.tobytes() == done.weights.tobytes()
        assert other.averaged.tobytes() == server.averaged.tobytes()
        assert again.state_lost == 0


def test_its_steps_are_as_long_as_its_learning_rate_from_the_first_to_the_last() -> None:
    """Second moments that were taken for as old as the run would make them many times as long."""
    own = {"num_server_rounds": 4, "train__local_steps": 60, "train__lr_schedule": "constant", "train__warmup_steps": 0}
    c = config(**FINISH | own)
    for done in run(c)[1:]:
        longest = c.finish.learning_rate * c.finish.local_steps * math.sqrt(done.weights.size)
        assert 0.1 * longest < done.update_norm < 1.2 * longest


def test_updates_of_a_run_that_ended_at_nothing_do_not_make_its_own_too_long_but_false_ones_are() -> None:
    c = config(**{**FINISH, "train__learning_rate": 1e-7})
    assert [done.clients_ok for done in run(c)] == [4] * 5
    server, handlers = feddm(c), nodes(c)
    channel = exact(server._split.shared.layout.fingerprint, server.weights.size)

    def lie(message: Message, reply: Message) -> Message:
        number = int(str(message.content.config_records["task"]["round"]))
        if number > 2:
            far = channel.encode(server.weights + np.float32(0.2), c.codec.target, number)
            reply.content.array_records["weights"]["frame"].data = far
        return reply

    handlers[997] = on_train(handlers[997], lie)
    assert [done.failures for done in run(c, handlers)] == [{}, {}, *[{"outlier": 1}] * 3]


def test_its_warm_up_and_its_cosine_are_its_own() -> None:
    c = parse({"num-server-rounds": 30, "finish.rounds": 10, "finish.local-steps": 4, "train.local-steps": 100})
    alone = parse({"num-server-rounds": 20, "train.local-steps": 100})
    for number in (1, 7, 20):
        at = Progress(number, 100 * (number - 1))
        assert learning_rate(c, at, 3, 100) == learning_rate(alone, at, 3, 100)
    own = parse({"num-server-rounds": 10, "train.local-steps": 4})
    for number in (1, 7, 10):
        before = 4 * (number - 1)
        found = learning_rate(c.in_round(20 + number), Progress(20 + number, before), 1, 4)
        assert found == learning_rate(own, Progress(number, before), 1, 4)


def test_a_run_that_is_over_gets_one(tmp_path: Path) -> None:
    """As if it had been meant to have it."""
    keys = {**LEAN, "out_dir": str(tmp_path), "sample__count": 1, "sample__steps": 1, "train__moments": "reset"}
    for name, steps in (("later", ({}, {**FINISH, "resume": True})), ("at-once", (FINISH,))):
        for own in steps:
            run_server(config(**keys, run_name=name, **own))
    found = [newest(tmp_path / name / "checkpoints") for name in ("later", "at-once")]
    weights = [one.tensors["weights"].tobytes() for one in found]
    assert weights[0] == weights[1]
    card = (tmp_path / "later" / "model" / "README.md").read_text()
    assert "| `finish.rounds` | `3` |" in card


def test_one_that_has_begun_stays_as_it_is() -> None:
    before = flatten(parse({"num-server-rounds": 30, "finish.rounds": 10, "train.lr-schedule": "constant"}))
    more = parse({"num-server-rounds": 40, "finish.rounds": 20, "train.lr-schedule": "constant"})
    check_same_run(more, before, 20)
    with pytest.raises(ConfigError, match=r"\Aseed = 1: was 0 in the run to resume, and must stay so\Z"):
        check_same_run(replace(more, seed=1), before, 20)  # the finish is not what is wrong
    for other in (more, parse({"num-server-rounds": 40, "finish.rounds": 10, "train.lr-schedule": "constant"})):
        with pytest.raises(ConfigError, match="num-server-rounds = 40: was 30 in the run to resume"):
            check_same_run(other, before, 21)
    with pytest.raises(ConfigError, match=r"(?s)finish.rounds = 0: was 10.*num-server-rounds = 30: 20 lets"):
        check_same_run(parse({"num-server-rounds": 30, "train.lr-schedule": "constant"}), before, 20)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (
            {"num-server-rounds": 5, "finish.rounds": 6},
            r"finish.rounds = 6 with num-server-rounds = 5: must be at most",
        ),
        ({"finish.local-steps": 8}, r"finish.local-steps = 8 with finish.rounds = 0: acts with finish.rounds above 0"),
        (
            {"finish.rounds": 5, "strategy": "feddm-secure"},
            r"finish.rounds = 5 with privacy.secure-aggregation = true: must be 0",
        ),
        (
            {"finish.rounds": 5, "privacy.mechanism": "dp-sgd", "privacy.epsilon": 8},
            r"finish.rounds = 5 with privacy.mechanism = 'dp-sgd': must be 0",
        ),
    ],
)
def test_what_cannot_be_is_said(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse(keys)
