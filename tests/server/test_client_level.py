"""DP-FedAvg: what a node changes is bounded, what hides it is noise, and what it costs is counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from local_grid import LocalGrid, config, feddm, nodes, on_train, run, run_server

from feddm_flwr.compute.secret_random import SecretRandom
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.privacy.accounting import Rounds, epsilon_of_rounds, noise_for_rounds
from feddm_flwr.reporting.records import read_rounds
from feddm_flwr.server.client_level import ClientLevel

FEDAVG: dict[str, Any] = {
    "privacy__mechanism": "dp-fedavg",
    "privacy__noise_multiplier": 1.0,
    "privacy__clip_norm": 0.5,
    "eval__average_by": "none",
}


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no noise, so that updates can be seen."""
    monkeypatch.setattr(SecretRandom, "normal", lambda self, size, device: torch.zeros(size, dtype=torch.float64))


def update_of(c: RunConfig, handlers: dict[int, Any] | None = None) -> np.ndarray:
    """What a round of a run changes."""
    server = feddm(c)
    before = server.weights.copy()
    (done,) = server.run(LocalGrid(handlers or nodes(c)))
    return np.asarray(done.weights - before)


@pytest.mark.usefixtures("silent")
def test_what_one_node_sends_instead_changes_the_mean_by_no_more_than_is_accounted_for() -> None:
    """Whatever it sends, garbage included."""
    c = config(**FEDAVG, num_server_rounds=1)
    up = feddm(c)._receiver._channels["all"]

    def lie(message: Message, reply: Message) -> Message:
        frame = up.encode(np.full(up.size, 7.0, np.float32), "weights", 1)
        weights = ArrayRecord({"frame": Array("uint8", (len(frame),), "feddm.frame", frame)})
        return Message(RecordDict({"weights": weights, "report": reply.content["report"]}), reply_to=message)

    handlers = nodes(c)
    honest = update_of(c)
    lied = update_of(c, {i: on_train(h, lie) if i == 1000 else h for i, h in handlers.items()})
    apart = float(np.linalg.norm((honest - lied).astype(np.float64)))
    assert 0.1 < apart <= 2 * 0.5 / 4 * (1 + 1e-3)
    assert float(np.linalg.norm(honest.astype(np.float64))) <= 0.5 * (1 + 1e-3)


@pytest.mark.usefixtures("silent")
def test_a_node_that_fails_counts_as_nothing_and_makes_no_other_count_more() -> None:
    c = config(**FEDAVG, num_server_rounds=1, min_replies=3)
    handlers = nodes(c)

    def none(message: Message, reply: Message) -> Message:
        return Message(RecordDict({"report": reply.content["report"]}), reply_to=message)

    honest = update_of(c)
    fewer = update_of(c, {i: on_train(h, none) if i == 1000 else h for i, h in handlers.items()})
    assert float(np.linalg.norm((honest - fewer).astype(np.float64))) <= 0.5 / 4 * (1 + 1e-3)


def test_the_noise_is_of_the_size_that_is_accounted_for() -> None:
    level = ClientLevel(config(**FEDAVG).privacy, 1)
    mean = np.full(200_001, 0.25, np.float32)
    noisy = level.protect(mean, accepted=3, asked=4, online=4)
    found = (noisy.astype(np.float64) - 0.25 * 3 / 4) / (1.0 * 0.5 / 4)
    assert found.mean() == pytest.approx(0, abs=5 / math.sqrt(len(found)))
    assert found.std() == pytest.approx(1, abs=5 / math.sqrt(2 * len(found)))


def test_rounds_are_counted_and_a_resumed_run_goes_on_counting() -> None:
    c = config(**FEDAVG, fraction_train=0.5, num_server_rounds=3)
    first = feddm(c)
    rounds = first.run(LocalGrid(nodes(c)))
    for number in (1, 2):
        assert next(rounds).epsilon == pytest.approx(epsilon_of_rounds([Rounds(4, 2, 1.0, number)], 1e-5))
    second = feddm(c)
    second.restore(first.checkpoint())
    (last,) = second.run(LocalGrid(nodes(c)))
    assert last.epsilon == pytest.approx(epsilon_of_rounds([Rounds(4, 2, 1.0, 3)], 1e-5))


def test_whole_federations_cost_what_a_gaussian_costs_and_samples_less() -> None:
    whole = epsilon_of_rounds([Rounds(100, 100, 8.0, 10)], 1e-5)
    single = 4.0 / math.sqrt(10)  # of one round, over what a replaced update changes
    from scipy.stats import norm

    exact = norm.cdf(0.5 / single - whole * single) - math.exp(whole) * norm.cdf(-0.5 / single - whole * single)
    assert exact <= 1e-5
    assert epsilon_of_rounds([Rounds(100, 10, 8.0, 10)], 1e-5) < whole / 2
    assert epsilon_of_rounds([], 1e-5) == 0


def test_a_limit_finds_the_noise_and_ends_a_run_that_repeats(tmp_path: Path) -> None:
    c = config(**{**FEDAVG, "privacy__noise_multiplier": 0.0}, privacy__epsilon=8.0)
    done = run(c)
    assert 7.9 < done[-1].epsilon <= 8.0
    noise = noise_for_rounds(8.0, 1e-5, 4, 4, 2)
    assert done[0].epsilon == pytest.approx(epsilon_of_rounds([Rounds(4, 4, noise, 1)], 1e-5))
    limit = epsilon_of_rounds([Rounds(4, 4, 1.0, 2)], 1e-5) * 1.01
    c = config(**FEDAVG, privacy__epsilon=limit, num_server_rounds=5, out_dir=str(tmp_path), run_name="r")
    run_server(c)
    assert len(read_rounds(tmp_path / "r")) == 2
    assert "another would cost more than privacy.epsilon" in (tmp_path / "r" / "status.json").read_text()
    assert "what one node has in place of another" in (tmp_path / "r" / "model" / "README.md").read_text()
    assert "privacy of each node" in (tmp_path / "r" / "report.html").read_text()


def test_nobody_can_foretell_noise_or_sample() -> None:
    c = config(**FEDAVG, num_server_rounds=1)
    assert run(c)[-1].weights.tobytes() != run(c)[-1].weights.tobytes()
    level = ClientLevel(c.privacy, 1)
    names = [f"node-{i:02}" for i in range(40)]
    drawn = [level.choose(names, 10) for _ in range(300)]
    assert all(len({*one}) == 10 for one in drawn)
    counts = [sum(name in one for one in drawn) for name in names]
    assert 40 < min(counts) <= max(counts) < 115  # 75 each, standard deviation 7.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server__aggregation", "median"),
        ("train__moments", "server"),
        ("train__control", "scaffold"),
        ("eval__average_by", "loss"),
        ("train__max_seconds", 5.0),
        ("server__clip_norm", 2.0),
        ("exchange__parts", "usplit"),
        ("privacy__multiplicity", 2),
        ("privacy__figures", "unprotected"),
    ],
)
def test_what_else_of_a_node_would_enter_the_model_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key.replace("__", ".").replace("_", "-")):
        config(**{**FEDAVG, key: value})
