"""Runs whose server learns sums only: the sum is exact, nothing else is told, and nodes may vanish at any stage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message
from local_grid import (
    AS_PRESET,
    Handler,
    LocalGrid,
    config,
    feddm,
    introductions,
    node,
    nodes,
    on_train,
    run,
    run_server,
)

from feddm_flwr.cli import certificates
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.exchange.sums import Figures, Scales, SumGrid, shares_of
from feddm_flwr.node.secure import SecureNode
from feddm_flwr.privacy.secure_sum import SecureSumError
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.protocol.tasks import CONFIRM, KEYS, OPEN, SHARES, SUMS
from feddm_flwr.reporting.records import read_rounds
from feddm_flwr.server.federation.roster import Roster
from feddm_flwr.server.round import RoundInProgress

SECURE: dict[str, Any] = {"strategy": "feddm-secure"}
Words = dict[str, np.ndarray]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Words:
    """By node: the words that it masked last, before it did."""
    seen: Words = {}
    mask = SecureNode.mask

    def spy(self: SecureNode, words: np.ndarray, *rest: Any) -> None:
        before = words.copy()
        mask(self, words, *rest)
        seen[self._name] = before

    monkeypatch.setattr(SecureNode, "mask", spy)
    return seen


@pytest.fixture
def totals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, list[str]]]:
    """What the server decoded, and of which nodes."""
    seen: list[tuple[np.ndarray, list[str]]] = []
    decode = SumGrid.decode

    def spy(self: SumGrid, total: np.ndarray, scales: Any, images: Any) -> Any:
        seen.append((total.copy(), sorted(images)))
        return decode(self, total, scales, images)

    monkeypatch.setattr(SumGrid, "decode", spy)
    return seen


def stage_of(message: Message) -> str:
    kind = message.metadata.message_type
    return str(message.content.config_records["task"]["stage"]) if kind == SUMS else kind


def failing_at(handle: Handler, stage: str, times: int = 10**6) -> Handler:
    """The node, gone at a stage of its first rounds; where it trained before that, what it did is done."""
    left = [times]

    def fail(message: Message) -> Message | None:
        reply = handle(message)
        if stage_of(message) != stage or left[0] == 0:
            return reply
        left[0] -= 1
        return Message(Error(2, "gone"), reply_to=message)

    return fail


def changed(handle: Handler, stage: str, change: Callable[[dict[str, Any]], Any]) -> Handler:
    """The node, to which a server says something else at a stage."""

    def handler(message: Message) -> Message | None:
        if stage_of(message) == stage:
            task = dict(message.content.config_records["task"])
            key = "secure" if stage == "train" else "content"
            said = json.loads(str(task[key]))
            task[key] = json.dumps(change(said) or said)
            message.content.config_records["task"] = ConfigRecord(task)
        try:
            return handle(message)
        except SecureSumError as error:
            return Message(Error(2, str(error)), reply_to=message)

    return handler


def test_the_sum_is_exact_and_all_that_is_told(plain: Words, totals: list[Any]) -> None:
    c = config(**SECURE, **AS_PRESET, num_server_rounds=1, eval__every=1)
    reports: list[dict[str, Any]] = []

    def note(message: Message, reply: Message) -> Message:
        reports.append(dict(reply.content["report"]))
        return reply

    (done,) = run(c, {i: on_train(h, note) for i, h in nodes(c).items()})
    (total, names) = totals[0]
    assert names == sorted(plain)
    assert total.tolist() == sum(plain.values(), np.zeros(1, np.uint64)).tolist()
    assert {(r["train-loss"], r["coding-error"], str(r["eval-loss"]), r["eval-levels"]) for r in reports} == {
        (0.0, 0.0, "nan", "[]")
    }
    assert 0.5 < done.train_loss < 2
    assert 0.5 < done.eval_loss < 2
    assert len(done.eval_levels) == 10
    assert 0 < done.coding_error < 1
    assert done.eval_losses == {}
    assert math.isnan(done.drift)
    assert done.bytes_up < done.bytes_up_fp32 / 15


@pytest.mark.parametrize("weights", ["images", "equal"])
def test_the_mean_is_that_of_what_the_nodes_keep_out_of_their_residuals(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they have very unequal numbers of images."""
    sent: dict[str, np.ndarray] = {}
    encode = SumGrid.encode

    def spy(self: SumGrid, vector: Any, scales: Any, name: str) -> Any:
        words, sent[name] = encode(self, vector, scales, name)
        return words, sent[name]

    monkeypatch.setattr(SumGrid, "encode", spy)
    c = config(
        **SECURE,
        **AS_PRESET,
        num_server_rounds=1,
        data__partition="dirichlet",
        data__alpha=0.5,
        server__optimizer="averaging",
        server__weights=weights,
    )
    server = feddm(c)
    before = server.weights.copy()
    (done,) = server.run(LocalGrid(nodes(c)))
    images = {n.name: n.images for n in server.nodes}
    assert max(images.values()) > 1.5 * min(images.values())
    count = images if weights == "images" else dict.fromkeys(images, 1)
    mean = sum(count[name] * sent[name].astype(np.float64) for name in sent) / sum(count.values())
    assert np.count_nonzero(mean) > 1000
    assert done.weights - before == pytest.approx(mean, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("stage", "gone"), [(KEYS, 2), (SHARES, 2), ("train", 1), ("train", 2), (CONFIRM, 2), (OPEN, 2)]
)
def test_nodes_may_vanish_at_any_stage(stage: str, gone: int, plain: Words, totals: list[Any]) -> None:
    c = config(**SECURE, num_server_rounds=2, min_replies=3)
    handlers = nodes(c, 5)
    lost = sorted(handlers)[:gone]
    names = {f"node-{1000 - i}" for i in lost}
    done = run(c, {i: failing_at(h, stage) if i in lost else h for i, h in handlers.items()})
    for one, (_, survivors) in zip(done, totals, strict=True):
        assert {*survivors} == ({f"node-{k}" for k in range(5)} - (names if stage not in (CONFIRM, OPEN) else set()))
        assert one.clients_ok == len(survivors)
    last, survivors = totals[-1]
    assert last.tolist() == sum((plain[name] for name in survivors), np.zeros(1, np.uint64)).tolist()


def test_a_run_does_not_depend_on_who_answers_first_nor_on_masks() -> None:
    c = config(**SECURE)
    assert run(c)[-1].weights.tobytes() == run(c, backwards=True)[-1].weights.tobytes()


@pytest.mark.parametrize("stage", [KEYS, SHARES, "train"])
def test_a_round_with_too_few_nodes_is_repeated(stage: str, totals: list[Any]) -> None:
    c = config(**SECURE, num_server_rounds=1, max_round_retries=1)
    handlers = {i: failing_at(h, stage, times=1) if i < 999 else h for i, h in nodes(c).items()}
    (done,) = run(c, handlers)
    assert done.clients_ok == 4
    assert len(totals) == 1


def test_a_training_whose_sum_was_asked_for_is_never_summed_over_others(plain: Words, totals: list[Any]) -> None:
    """Node 4 is dropped in the training; then too few open the sum, and all come back: the sum of five less that of
    four would be node 4's update. So what they train is another."""
    c = config(**SECURE, num_server_rounds=1, max_round_retries=1, min_replies=3)
    handlers = nodes(c, 5)
    handlers[996] = failing_at(handlers[996], "train", times=1)
    first: Words = {}

    def open_late(message: Message) -> Message | None:
        if stage_of(message) == OPEN and not first:
            first.update(plain)
            return Message(Error(2, "gone"), reply_to=message)
        return handlers[999](message)

    handlers[1000] = failing_at(handlers[1000], OPEN, times=1)
    (done,) = run(c, {**handlers, 999: open_late})
    assert done.clients_ok == 5
    assert len(totals) == 1
    assert all(plain[name].tolist() != first[name].tolist() for name in first)


def test_after_a_restart_a_sum_is_of_the_same_nodes_while_they_are_there(totals: list[Any]) -> None:
    c = config(**SECURE, num_server_rounds=1, max_round_retries=1, fraction_train=0.5)
    first = feddm(c)
    (one,) = first.run(LocalGrid(nodes(c, 8)))
    asked = totals[-1][1]
    again = feddm(c)
    again.restore(first_checkpoint := feddm(c).checkpoint())
    again._outgoing.run_uuid = first._outgoing.run_uuid
    (same,) = again.run(LocalGrid({**nodes(c, 8)}))
    assert totals[-1][1] == asked
    assert same.weights.tobytes() == one.weights.tobytes()
    third = feddm(c)
    third.restore(first_checkpoint)
    third._outgoing.run_uuid = first._outgoing.run_uuid
    handlers = nodes(c, 8)
    del handlers[1000 - int(asked[0][-1])]
    (other,) = third.run(LocalGrid(handlers))
    assert asked[0] not in totals[-1][1]
    assert other.weights.tobytes() != one.weights.tobytes()


def test_a_resumed_run_has_the_same_bits() -> None:
    c = config(**SECURE, num_server_rounds=3)
    whole = run(c)[-1].weights.tobytes()
    first = feddm(c)
    rounds = first.run(LocalGrid(nodes(c)))
    for _ in range(2):
        next(rounds)
    second = feddm(c)
    second.restore(first.checkpoint())
    assert [*second.run(LocalGrid(nodes(c)))][-1].weights.tobytes() == whole


def test_the_masks_of_a_session_are_used_once() -> None:
    c = config(**SECURE, num_server_rounds=1, min_replies=3)
    handlers = nodes(c)
    answers: list[str] = []

    def twice(message: Message) -> Message | None:
        reply = handlers[1000](message)
        if stage_of(message) == "train":
            with pytest.raises(ValueError, match="masks were used before"):
                handlers[1000](message)
            answers.append("refused")
        return reply

    (done,) = run(c, {**handlers, 1000: twice})
    assert done.clients_ok == 4
    assert answers == ["refused"]


def test_a_node_that_is_shown_other_nodes_than_the_rest_can_read_no_shares() -> None:
    """Its threshold would be lower: the others could tell of the masks of all that it has masks with."""
    c = config(**SECURE, num_server_rounds=1, min_replies=3)
    handlers = nodes(c, 5)

    def fewer(said: Any) -> None:
        del said["node-4"]

    def and_answers(message: Message) -> Message | None:
        reply = changed(handlers[1000], SHARES, fewer)(message)
        if reply and stage_of(message) == SHARES:
            said = json.loads(str(reply.content["report"]["answer"]))
            reply.content["report"]["answer"] = json.dumps(said | {"node-4": said["node-1"]})
        return reply

    with pytest.raises(RunFailedError, match="what is said to be of node-0 cannot be opened"):
        run(c, {**handlers, 1000: and_answers})


def test_survivors_that_are_too_few_or_not_of_the_sum_are_not_opened() -> None:
    c = config(**SECURE, num_server_rounds=1)
    for survivors, why in (
        (["node-0", "node-1"], "a sum of 2 nodes; at least 3 are needed"),
        (["node-0", "node-0", "node-0", "node-1"], "a sum of 2 nodes; at least 3 are needed"),
        (["node-1", "node-2", "node-9"], "is told of to others"),
    ):
        with pytest.raises(RunFailedError, match=why):
            run(c, {i: changed(h, CONFIRM, lambda said, s=survivors: s) for i, h in nodes(c).items()})


def test_a_training_is_not_summed_again_with_other_weights() -> None:
    """Here of a server that was started anew and says that the run began otherwise."""
    c = config(**SECURE, num_server_rounds=1)
    first = feddm(c)
    [*first.run(LocalGrid(nodes(c)))]
    again = feddm(c)
    again._outgoing.run_uuid = first._outgoing.run_uuid
    assert again._scales
    again._scales.values *= 2
    with pytest.raises(RunFailedError, match="a sum of round 1/0 was told of that was of other weights"):
        [*again.run(LocalGrid({i: told(h) for i, h in nodes(c).items()}))]


def told(handle: Handler) -> Handler:
    """The node, whose refusals reach the server."""
    return changed(handle, "", lambda said: said)


@pytest.mark.parametrize("value", [False, 0.0, -1, 99])
def test_a_repeat_that_is_none_is_refused(value: Any) -> None:
    c = config(**SECURE, num_server_rounds=1)

    def other(message: Message, handle: Handler) -> Message | None:
        if stage_of(message) == KEYS:
            task = dict(message.content.config_records["task"])
            message.content.config_records["task"] = ConfigRecord(task | {"repeat": value})
        return handle(message)

    with pytest.raises(RunFailedError, match=r"TypeError|was repeated"):
        run(c, {i: (lambda m, h=h: other(m, h)) for i, h in nodes(c).items()})


@pytest.mark.parametrize("opened", [None, ["ghost"], {"node-0": 1}])
@pytest.mark.parametrize("answers", [{KEYS, SHARES}, {CONFIRM, OPEN}])
def test_a_node_that_answers_nonsense_costs_its_reply(opened: Any, answers: set[str]) -> None:
    c = config(**SECURE, num_server_rounds=1)
    handlers = nodes(c)

    def nonsense(message: Message) -> Message | None:
        reply = handlers[1000](message)
        if reply and stage_of(message) in answers:
            said = json.loads(str(reply.content["report"]["answer"]))
            wrong = said | {"opened": opened} if stage_of(message) == KEYS else dict.fromkeys(said, opened)
            reply.content["report"]["answer"] = json.dumps(wrong)
        return reply

    (done,) = run(c, {**handlers, 1000: nonsense})
    assert done.clients_ok >= 3


def test_shares_that_are_not_the_senders_are_noticed_before_anything_leaves() -> None:
    """As of one whose keys of before a server had signed for again: it has not the secrets behind them."""
    c = config(**SECURE, num_server_rounds=1)
    handlers = nodes(c)

    def other(said: Any) -> None:
        said["sealed"]["node-1"] = said["sealed"]["node-2"]

    handlers[1000] = changed(handlers[1000], "train", other)
    (done,) = run(c, handlers)
    assert done.clients_ok == 3


def test_nodes_whose_runs_are_not_configured_alike_have_no_sum() -> None:
    """A server could tell all but one to train with a learning rate of nothing."""
    c = config(**SECURE, num_server_rounds=1)
    handlers = nodes(c) | {1000: node(config(**SECURE, num_server_rounds=1, train__learning_rate=1e-9), 0)}
    with pytest.raises(RunFailedError, match="no sum of packed digits"):
        run(c, handlers)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("keys")
    certificates.make(folder, [], ["north", "south", "east", "west"], 30)
    return folder


def real_nodes(c: RunConfig, keys: Path, **own: Any) -> dict[int, Handler]:
    """Nodes with keys of their own, which know each other's."""
    found = {}
    for i, name in enumerate(("north", "south", "east", "west")):
        files = {"secure-key": str(keys / "nodes" / name), "secure-peers": str(keys / "peers.pub")}
        found[1000 - i] = node(c, i, **{"node-name": name, **files, **own})
    return found


def test_a_server_that_swaps_a_key_is_found_out(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(**SECURE, num_server_rounds=1, min_replies=3)
    assert run(c, real_nodes(c, keys))[0].clients_ok == 4

    def swap(said: Any) -> None:
        if "north" in said:
            said["north"]["masking"] = said["south"]["masking"]

    notes: list[str] = []
    handlers = {i: changed(h, SHARES, swap) for i, h in real_nodes(c, keys).items()}
    monkeypatch.setattr(RoundInProgress, "fail", lambda self, name, failure: notes.append(f"{name}: {failure.text}"))
    (done,) = run(c, handlers)
    assert done.clients_ok == 3  # the sum is of the others
    (note,) = notes
    assert "refuses the keys of north: its signature is not of the key that this node knows" in note
    assert note.startswith("north: ")


def test_a_node_without_its_own_key_or_the_keys_of_others_takes_no_part(keys: Path, tmp_path: Path) -> None:
    c = config(**SECURE, wait_timeout=1.0, min_nodes=4)
    (tmp_path / "peers").write_text("\n".join((keys / "peers.pub").read_text().splitlines()[1:]))
    for own, why in (
        ({"secure-key": ""}, "secure-key is missing in the --node-config"),
        ({"secure-peers": str(keys / "none")}, "cannot be read: No such file"),
        ({"secure-key": str(keys / "ca.key")}, "cannot be read"),
        ({"secure-key": str(keys / "nodes" / "north")}, "has not the public key of this node"),
        ({"secure-peers": str(tmp_path / "peers")}, "has not the public key of this node, east"),
    ):
        roster = Roster(c)
        with pytest.raises((ConfigError, RunFailedError), match=why):
            roster.wait(LocalGrid(real_nodes(c, keys, **own)), first=True)


def test_a_broken_node_that_sends_something_else_spoils_the_sum_and_is_noticed() -> None:
    c = config(**SECURE, num_server_rounds=1)
    handlers = nodes(c)

    def spoil(self: Message, reply: Message) -> Message:
        from feddm_flwr.exchange.sums import read_words, write_words

        frame = reply.content.array_records["weights"]["frame"]
        layout = feddm(c)._split.shared.layout
        grid = SumGrid(c, layout.size, 1, shares_of(c, {n.name: n.images for n in introductions(c).values()}))
        words = read_words(frame.data, layout.fingerprint, 1, grid.words)
        frame.data = write_words(words + np.uint64(2**63), layout.fingerprint, 1)
        return reply

    handlers[1000] = on_train(handlers[1000], spoil)
    with pytest.raises(RunFailedError, match="no sum of packed digits: a node sent something else"):
        run(c, handlers)


def test_nodes_hide_their_classes_and_refuse_questions_unless_the_run_says_so() -> None:
    hidden = introductions(config(**SECURE))
    assert all(n.class_counts == {} for n in hidden.values())
    told = introductions(config(**SECURE, privacy__figures="unprotected"))
    assert all(n.class_counts for n in told.values())
    with pytest.raises(ConfigError, match=r"eval\.features"):
        config(**SECURE, eval__features="random", sample__every=0)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"strategy": "feddm-lean", "codec__uplink": "sum"}, "'sum' and true go together"),
        ({**SECURE, "codec__uplink": "int2"}, "'sum' and true go together"),
        ({**SECURE, "server__aggregation": "median"}, "server.aggregation = 'median' with privacy.secure-aggregation"),
        ({**SECURE, "server__clip_norm": 2.0}, "server.clip-norm"),
        ({**SECURE, "server__norm_limit": 3.0}, "server.norm-limit"),
        ({**SECURE, "exchange__parts": "usplit"}, "exchange.parts"),
        ({**SECURE, "train__moments": "server"}, "train.moments"),
        ({**SECURE, "train__control": "scaffold"}, "train.control"),
        ({**SECURE, "min_replies": 2}, "min-replies = 2"),
        ({**SECURE, "privacy__threshold": 0.4}, "privacy.threshold"),
        ({"privacy__threshold": 0.7}, "privacy.threshold = 0.7 with secure-aggregation = false"),
        ({"codec__sum_share": 0.7}, "codec.sum-share"),
        ({"strategy": "feddm-vanilla", "privacy__secure_aggregation": True}, "with strategy = 'feddm-vanilla'"),
        (
            {
                **SECURE,
                "privacy__mechanism": "dp-fedavg",
                "privacy__noise_multiplier": 1.0,
                "eval__average_by": "none",
            },
            "clips no update",
        ),
    ],
)
def test_what_cannot_go_with_sums_is_refused_by_name(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        config(**keys)


def test_secure_sums_go_with_private_training_with_personal_layers_and_with_other_strategies(tmp_path: Path) -> None:
    for keys in (
        {**SECURE, "privacy__mechanism": "dp-sgd", "privacy__noise_multiplier": 1.0},
        {**SECURE, "exchange__personal": "conv_in.*"},
        {"strategy": "feddm-quant", "privacy__secure_aggregation": True},
        {**SECURE, "codec__downlink": "none", "fraction_train": 0.75},
    ):
        own = {"out_dir": str(tmp_path), "run_name": f"r{len([*tmp_path.iterdir()])}"}
        c = config(**keys, **own, num_server_rounds=2, sample__count=2, sample__steps=2)
        run_server(c, nodes(c))
        rows = read_rounds(tmp_path / c.run_name)
        assert [row.clients_failed for row in rows] == [0, 0]
        if not c.exchange.personal:
            assert "(secure aggregation)" in (tmp_path / c.run_name / "model" / "README.md").read_text()


def test_every_block_is_sent_as_often_as_any_other_and_scales_are_learnt() -> None:
    c = config(**SECURE, codec__sum_share=0.3)
    counts = np.zeros(-(-100_000 // 256), int)
    for number in range(1, 101):
        grid = SumGrid(c, 100_000, number, shares_of(c, {"a": 10, "b": 20, "c": 30}))
        counts[grid.sent] += 1
        assert abs(len(grid.sent) / len(counts) - 0.3) < 0.1
    assert {*counts} <= {29, 30, 31}
    scales = Scales(c, 100_000, "0" * 32)
    random = np.random.default_rng(0)
    vector = (random.standard_normal(100_000) * np.repeat(10.0 ** random.uniform(-6, 2, 391), 256)[:100_000]).astype(
        np.float32
    )
    for number in range(1, 20):
        grid = SumGrid(c, 100_000, number, shares_of(c, {"a": 10, "b": 10, "c": 10}))
        _, expected = scales.frame(grid, number)
        words, decoded = grid.encode(vector, expected, "a")
        words = grid.with_figures(words, Figures(1.0, 0.0, math.nan, []), 10, 0)
        mean, octaves, figures = grid.decode(words + words + words, expected, {"a": 10, "b": 10, "c": 10})
        assert np.allclose(mean, decoded, rtol=1e-5, atol=0)
        scales.learn(grid, octaves)
    sent = np.zeros(len(vector), bool)
    for block in grid.sent:
        sent[256 * block : 256 * (block + 1)] = True
    lost = np.linalg.norm((vector - decoded)[sent]) / np.linalg.norm(vector[sent])
    assert lost < 0.5  # of ternary digits the least is 0.44
    assert figures.train_loss == pytest.approx(1.0)
    assert math.isnan(figures.eval_loss)


def test_figures_are_means_of_the_nodes_that_have_them() -> None:
    """One has no held-out images, another so few that some levels have none."""
    levels = [float(level) for level in range(10)]
    nodes = {"a": (30, 4, Figures(1.0, 0.5, 0.3, levels)), "b": (10, 1, Figures(2.0, 0.1, 0.8, [math.nan] * 10))}
    nodes["c"] = (10, 0, Figures(3.0, 0.0, math.nan, []))
    images = {name: node[0] for name, node in nodes.items()}
    grid = SumGrid(c := config(**SECURE), 1000, 1, shares_of(c, images))
    expected = np.full(len(grid.sent), 1.0, np.float32)
    zeros = {name: grid.encode(np.zeros(1000, np.float32), expected, name)[0] for name in nodes}
    total = np.zeros(grid.words, np.uint64)
    for name, (count, held_out, figures) in nodes.items():
        total += grid.with_figures(zeros[name], figures, count, held_out)
    mean, _, found = grid.decode(total, expected, images)
    assert not mean.any()
    assert found.train_loss == pytest.approx((30 * 1 + 10 * 2 + 10 * 3) / 50, abs=1e-5)
    assert found.coding_error == pytest.approx((30 * 0.5 + 10 * 0.1) / 50, abs=1e-5)
    assert found.eval_loss == pytest.approx((4 * 0.3 + 0.8) / 5, abs=1e-5)
    assert found.eval_levels == pytest.approx(levels, abs=1e-5)
