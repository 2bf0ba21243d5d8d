"""Runs with differential privacy against nodes that have a budget, run out of it, or lose their ledger."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from local_grid import LocalGrid, config, feddm, node, nodes, on_train, run, run_server

from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.privacy.accounting import Steps, epsilon
from feddm_flwr.privacy.ledger import Ledger
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.reporting.records import read_json, read_rounds, read_status
from feddm_flwr.server.federation.roster import Roster

PRIVATE: dict[str, Any] = {
    "privacy__mechanism": "dp-sgd",
    "privacy__noise_multiplier": 1.0,
    "eval__every": 1,
    "wait_timeout": 3.0,
}


def spent_by(c: RunConfig, images: int, rounds: int) -> float:
    """What so many rounds cost a node with so many images."""
    steps = Steps(c.train.batch_size / images, c.privacy.noise_multiplier, c.train.local_steps * rounds)
    return epsilon([steps], c.privacy.delta)


def images_of(c: RunConfig) -> dict[str, int]:
    roster = Roster(c)
    roster.wait(LocalGrid(nodes(c)), first=True)
    return {name: one.images for name, one in roster.nodes.items()}


def ledgers() -> dict[str, int]:
    """By node: the steps that its ledger knows of."""
    found = Path(os.environ["XDG_STATE_HOME"], "feddm", "privacy").glob("*.json")
    return {path.name.partition("-0")[0][:6]: sum(e.steps.count for e in Ledger(path).entries()) for path in found}


@pytest.mark.parametrize("strategy", ["feddm-vanilla", "feddm-lean", "feddm-slow-link"])
def test_a_private_run_tells_what_it_cost_each_node(strategy: str) -> None:
    c = config(**PRIVATE, strategy=strategy)
    images = images_of(c)
    done = run(c)
    for number, one in enumerate(done, 1):
        assert one.clients_ok == 4
        for name, (own, total) in one.epsilons.items():
            assert own == total == pytest.approx(spent_by(c, images[name], number))
        assert one.epsilon == max(own for own, _ in one.epsilons.values())
        assert math.isnan(one.eval_loss)
        assert one.eval_losses == {}
        assert 0 <= one.train_loss < 5
    assert {*ledgers().values()} == {4}


def test_nobody_can_repeat_the_noise() -> None:
    c = config(**PRIVATE)
    assert run(c)[-1].weights.tobytes() != run(c)[-1].weights.tobytes()


def test_the_next_run_on_the_same_images_goes_on_from_what_was_spent() -> None:
    c = config(**PRIVATE, num_server_rounds=1)
    images = images_of(c)
    run(c)
    (again,) = run(c)
    for name, (own, total) in again.epsilons.items():
        assert own == pytest.approx(spent_by(c, images[name], 1))
        assert total == pytest.approx(spent_by(c, images[name], 2))


def test_a_limit_finds_the_noise_and_is_kept() -> None:
    c = config(**{**PRIVATE, "privacy__noise_multiplier": 0.0}, privacy__epsilon=6.0)
    done = run(c)
    assert 5.9 < done[-1].epsilon <= 6.0
    assert done[0].epsilon < done[1].epsilon


def test_a_run_ends_with_its_model_when_too_few_have_budget_left(tmp_path: Path) -> None:
    probe = config(**PRIVATE)
    limit = min(spent_by(probe, n, 2) for n in images_of(probe).values()) * 1.02
    c = config(**PRIVATE, privacy__epsilon=limit, num_server_rounds=9, out_dir=str(tmp_path), run_name="r", min_nodes=4)
    run_server(c)
    rounds, status = read_rounds(tmp_path / "r"), read_status(tmp_path / "r")
    assert len(rounds) == 2
    assert rounds[-1].epsilon is not None
    assert rounds[-1].epsilon <= limit
    assert status["status"] == "completed"
    assert "ended after round 2 of 9" in status["reason"]
    assert (tmp_path / "r" / "model" / "model_index.json").exists()
    assert {
        name: one["class_counts"] for one in read_json(tmp_path / "r" / "nodes.json", []) for name in [one["name"]]
    } == {f"node-{i}": {} for i in range(4)}
    report = (tmp_path / "r" / "report.html").read_text()
    assert f"{rounds[-1].epsilon:.3g}" in report
    assert "differential privacy" in (tmp_path / "r" / "model" / "README.md").read_text()


def test_a_node_whose_budget_is_spent_is_left_out_and_the_others_go_on() -> None:
    c = config(**PRIVATE, num_server_rounds=4)
    limit = spent_by(c, images_of(c)["node-0"], 2) * 1.01
    handlers = nodes(c)
    handlers[1000] = node(c, 0, **{"dp-epsilon": limit, "dp-delta": 1e-5})
    done = run(c, handlers)
    assert [one.clients_ok for one in done] == [4, 4, 3, 3]
    assert done[1].epsilons["node-0"][1] <= limit
    assert [one.failures for one in done] == [{}] * 4
    with pytest.raises(ConfigError, match=r"node-0: dp-epsilon = .* of this node is spent"):
        run(config(**PRIVATE, min_nodes=4), handlers)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, "privacy.mechanism = 'none'"),
        ({**PRIVATE, "privacy__figures": "unprotected"}, "privacy.figures = 'unprotected'"),
    ],
)
def test_a_node_with_a_budget_takes_part_in_private_runs_only(keys: dict[str, Any], why: str) -> None:
    c = config(**keys)
    handlers = {i: node(c, 1000 - i, **{"dp-epsilon": 8.0}) for i in nodes(c)}
    with pytest.raises(ConfigError, match=why):
        run(c, handlers)


def test_a_task_that_comes_past_the_introduction_is_refused_all_the_same() -> None:
    """A server may say one thing when it asks who is there and another when it asks to train."""
    c, private = config(num_server_rounds=1), config(**PRIVATE, num_server_rounds=1)
    honest, lured = node(private, 0, **{"dp-epsilon": 8.0}), node(c, 0, **{"dp-epsilon": 8.0})
    handlers = nodes(c)
    handlers[1000] = lambda m: (honest if m.metadata.message_type == "query" else lured)(m)
    with pytest.raises(RunFailedError, match="this node has a budget"):
        run(c, handlers)


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"dp-epsilon": 0.0}, "dp-epsilon = 0.0 .* must be a number above 0"),
        ({"dp-epsilon": "8"}, "dp-epsilon = '8'"),
        ({"dp-epsilon": True}, "dp-epsilon = True"),
        ({"dp-epsilon": 8.0, "dp-delta": 1}, "dp-delta = 1 .* between 0 and 1"),
        ({"dp-delta": 1e-5}, "without dp-epsilon"),
        ({"dp-epsilon": 8.0, "dp-delta": 0.01}, "dp-delta = 0.01: must be less than 1 over the .* records"),
        ({"dp_epsilon": 8.0}, "'dp_epsilon' in the --node-config is not known: must be one of data-path, dp-delta"),
    ],
)
def test_a_budget_that_is_none_is_refused_by_name(own: dict[str, Any], why: str) -> None:
    c = config(**PRIVATE)
    with pytest.raises(ConfigError, match=why):
        run(c, {i: node(c, 1000 - i, **own) for i in nodes(c)})


def test_a_node_that_lost_its_ledger_trains_no_more(caplog: pytest.LogCaptureFixture) -> None:
    c = config(**PRIVATE, num_server_rounds=2, min_replies=3)
    handlers, calls = nodes(c), []

    def lose(message: Message) -> Message:
        calls.append(message.metadata.message_type)
        if calls.count("train") == 2:
            for path in Path(os.environ["XDG_STATE_HOME"], "feddm", "privacy").glob("node-1-*.json"):
                path.unlink()
        try:
            return node(c, 1)(message)
        except ConfigError as error:  # as Flower tells of it
            return Message(Error(2, str(error)), reply_to=message)

    handlers[999] = lose
    done = run(c, handlers)
    assert [one.clients_ok for one in done] == [4, 3]
    assert "knows of 0 steps of this run, the server of 2: restore it" in caplog.text


def test_the_rest_of_the_state_may_be_lost(tmp_path: Path) -> None:
    c = config(**PRIVATE, strategy="feddm-lean", num_server_rounds=2)
    server, state = feddm(c), Path(os.environ["XDG_STATE_HOME"], "feddm")
    rounds = []
    for done in server.run(LocalGrid(nodes(c))):
        rounds.append(done)
        for path in state.iterdir():
            if path.name != "privacy":
                shutil.rmtree(path)
    assert rounds[1].epsilon > rounds[0].epsilon
    assert rounds[1].state_lost == 4


def test_a_resumed_run_goes_on_counting() -> None:
    c = config(**PRIVATE, num_server_rounds=2)
    images = images_of(c)
    first = feddm(c)
    next(first.run(LocalGrid(nodes(c))))
    second = feddm(c)
    second.restore(first.checkpoint())
    (done,) = second.run(LocalGrid(nodes(c)))
    for name, (own, _) in done.epsilons.items():
        assert own == pytest.approx(spent_by(c, images[name], 2))


def test_a_node_cannot_end_a_run_that_counts_nothing() -> None:
    c = config(num_server_rounds=2)

    def lie(message: Message, reply: Message) -> Message:
        report = {**reply.content.config_records["report"], "goes-on": False, "epsilon": 3.0, "epsilon-total": 3.0}
        records = {"weights": reply.content["weights"], "report": ConfigRecord(report)}
        return Message(RecordDict(records), reply_to=message)

    done = run(c, {i: on_train(h, lie) for i, h in nodes(c).items()})
    assert [one.clients_ok for one in done] == [4, 4]
    assert all(math.isnan(one.epsilon) for one in done)


def test_private_training_learns() -> None:
    """With little noise; the loss that nodes tell is of the model that comes of it."""
    c = config(
        **{**PRIVATE, "privacy__noise_multiplier": 0.2, "train__local_steps": 10, "train__batch_size": 64},
        num_server_rounds=3,
        train__warmup_steps=0,
    )
    losses = [one.train_loss for one in run(c)]
    assert losses[-1] < 0.9 * losses[0]  # 0.78 to 0.81, by the noise
    assert np.isfinite(losses).all()


def test_too_few_from_the_start_is_an_error() -> None:
    c = config(**PRIVATE, privacy__epsilon=0.01)
    with pytest.raises((ConfigError, RunFailedError), match=r"privacy\.epsilon = 0\.01 is spent"):
        run(c)


CANARIES: dict[str, Any] = {
    "model__block_channels": "8,8",
    "model__attention": "0,0",
    "privacy__canaries": 60,
    "train__local_steps": 40,
    "train__batch_size": 32,
    "train__lr_schedule": "constant",
    "train__precision": "fp32",
    "eval__every": 0,
    "sample__count": 4,
}


@pytest.mark.parametrize("private", [False, True])
def test_canaries_are_found_without_privacy_and_not_with_it(private: bool, tmp_path: Path) -> None:
    keys = {"privacy__mechanism": "dp-sgd", "privacy__epsilon": 3.0, "train__local_steps": 10} if private else {}
    c = config(**{**CANARIES, **keys}, num_server_rounds=2 if private else 4, out_dir=str(tmp_path), run_name="r")
    run_server(c, {i: node(c, i, 16) for i in range(2)})  # few images, which are seen often
    final, rounds = read_json(tmp_path / "r" / "final.json", {}), read_rounds(tmp_path / "r")
    assert {*final["canaries"]} == {"node-0", "node-1"}
    for found in final["canaries"].values():
        assert found["guesses"] == 30
        assert 0 <= found["right"] <= 30
        if private:
            assert found["epsilon_at_least"] < rounds[-1].epsilon <= 3.0
            assert final["eval_loss"] is None  # nothing else is told
    proven = max(found["epsilon_at_least"] for found in final["canaries"].values())
    assert (proven == 0) if private else (proven > 0)
    assert "ε at least" in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize("keys", [{}, PRIVATE], ids=["plain", "private"])
def test_what_a_node_with_a_budget_finds_of_its_images_stays_in_its_log(keys: dict[str, Any]) -> None:
    c = config(**keys, data__classes="0,1", model__class_conditional=True)
    with pytest.raises(ConfigError) as refused:
        run(c, {i: node(c, 1000 - i, **{"dp-epsilon": 8.0}) for i in nodes(c)})
    assert "also has" not in str(refused.value)
    assert ("own log says why" if keys else "this node has a budget") in str(refused.value)


def test_a_private_task_takes_nothing_of_an_unprotected_run(caplog: pytest.LogCaptureFixture) -> None:
    """What coding lost of raw updates would otherwise leave the node in the next private one."""
    plain, private = config(strategy="feddm-lean"), config(**PRIVATE, strategy="feddm-lean")
    first = feddm(plain)
    next(first.run(LocalGrid(nodes(plain))))
    second = feddm(private)
    second.restore(first.checkpoint())
    (done,) = second.run(LocalGrid(nodes(private)))
    assert done.state_lost == 4


@pytest.mark.parametrize(
    ("keys", "kind", "frames"),
    [
        ({}, "reference", {}),
        ({}, "final", {}),
        ({"eval__features": "random"}, "final", {}),
        ({"eval__average_by": "loss"}, "final", {"samples": b"0" * 64}),
        ({**PRIVATE, "privacy__canaries": 20}, "final", {"samples": b"0" * 64}),
        ({**PRIVATE, "privacy__canaries": 20}, "reference", {}),
    ],
)
def test_a_question_that_the_configuration_has_no_reason_for_is_refused(
    keys: dict[str, Any], kind: str, frames: dict[str, bytes]
) -> None:
    c = config(**keys)
    answers = [*feddm(c).ask(LocalGrid(nodes(c)), kind, frames, {})]
    assert len(answers) == 4
    for _, answer in answers:
        assert "this run's configuration does not" in str(answer)


def budget_for(c: RunConfig, rounds: int, node_name: str) -> dict[str, float]:
    return {"dp-epsilon": spent_by(c, images_of(c)[node_name], rounds) * 1.01, "dp-delta": 1e-5}


def test_a_last_round_that_is_repeated_does_without_those_whose_budget_is_spent() -> None:
    c = config(**{**PRIVATE, "max_round_retries": 1}, num_server_rounds=2)
    handlers, failed = nodes(c), set[int]()
    for i in (1000, 999):
        handlers[i] = node(c, 1000 - i, **budget_for(c, 2, f"node-{1000 - i}"))

    def once(i: int) -> Any:
        def change(message: Message, reply: Message) -> Message:
            number = message.content["task"]["round"]
            if number == 2 and i not in failed:
                failed.add(i)
                return Message(Error(2, "broken"), reply_to=message)
            return reply

        return change

    done = run(c, {i: on_train(h, once(i)) if i in (998, 997) else h for i, h in handlers.items()})
    assert [one.clients_ok for one in done] == [4, 2]


def test_a_run_ends_with_its_model_where_those_with_budget_are_gone() -> None:
    c = config(**{**PRIVATE, "wait_timeout": 1.0}, num_server_rounds=6, min_nodes=1)
    handlers = nodes(c)
    for i in (1000, 999, 998):
        handlers[i] = node(c, 1000 - i, **budget_for(c, 2, f"node-{1000 - i}"))
    server, grid = feddm(c), LocalGrid(handlers)
    rounds = server.run(grid)
    next(rounds)
    del grid.handlers[997]
    assert [one.round for one in rounds] == [2]
    assert server.is_over
    assert "ended after round 2 of 6: 0 nodes have privacy budget left, 1 are needed" in server.ended_early


def test_a_run_that_ended_goes_on_where_budgets_were_raised() -> None:
    c = config(**PRIVATE, num_server_rounds=3)
    handlers = {i: node(c, 1000 - i, **budget_for(c, 1, f"node-{1000 - i}")) for i in nodes(c)}
    first = feddm(c)
    assert len([*first.run(LocalGrid(handlers))]) == 1
    assert first.is_over
    again = feddm(c)
    again.restore(first.checkpoint())
    assert [*again.run(LocalGrid(handlers))] == []
    assert again.is_over
    raised = feddm(c)
    raised.restore(first.checkpoint())
    handlers = {i: node(c, 1000 - i, **{"dp-epsilon": 50.0}) for i in nodes(c)}
    assert [one.round for one in raised.run(LocalGrid(handlers))] == [2, 3]


def test_nodes_without_budget_still_answer_questions() -> None:
    c = config(**PRIVATE, num_server_rounds=3, privacy__figures="unprotected", eval__features="random")
    limit = min(spent_by(c, n, 1) for n in images_of(c).values()) * 1.01
    c = config(
        **PRIVATE,
        num_server_rounds=3,
        privacy__figures="unprotected",
        privacy__epsilon=limit,
        eval__audit=True,
        eval__features="random",
    )
    server, grid = feddm(c), LocalGrid(nodes(c))
    assert len([*server.run(grid)]) == 1
    assert len([*server.ask(grid, "final", {}, {})]) == 4
