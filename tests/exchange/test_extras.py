"""What optimizers keep over the rounds: the steps that it makes, the way to the server and back, and resume."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from local_grid import Handler, LocalGrid, config, feddm, nodes, on_train, run, weights_without_node_3
from torch import Tensor, nn

from feddm_flwr.config import ConfigError, parse
from feddm_flwr.exchange.channel import FrameError
from feddm_flwr.exchange.extras import Extras, ExtrasChannel, mean_of_nodes
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.models import networks, parameters, pipelines, pretrained
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.training.gradient_terms import Control
from feddm_flwr.training.moments import Kept, Memory, Shared
from feddm_flwr.training.muon import orthogonal
from feddm_flwr.training.objectives import Drawn, HeldOut, Objective
from feddm_flwr.training.step import Step
from feddm_flwr.vector import Layout, Vector

AVERAGED = parse({"train.moments": "server"})
LAYOUT = Layout(("conv", "bias", "scale"), ((3, 2, 2, 2), (3,), ()))


class Quadratic(Objective):
    """A loss whose gradients are known."""

    def __len__(self) -> int:
        return 1

    def draw(self, index: Tensor, random: torch.Generator) -> Drawn:
        return (torch.ones(1),)

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        total = sum(((p - 1) ** 2 * (i + 1)).sum() for i, p in enumerate(network.parameters()))
        assert isinstance(total, Tensor)
        return total * drawn[0]

    def held_out(self, network: nn.Module, limit: int, name: str) -> HeldOut:
        return HeldOut()


def network() -> nn.Module:
    made = nn.Module()
    for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        made.register_parameter(name, nn.Parameter(values))
    return made


def trained(
    memory: Memory | None, steps: int = 3, optimizer: str = "adamw", model: nn.Module | None = None
) -> tuple[list[Tensor], Extras]:
    """The parameters after some steps, and what is left for the next round."""
    model = model or network()
    parameters: list[Tensor] = [*model.parameters()]
    t = parse({"train.max-grad-norm": 1e9, "train.optimizer": optimizer}).train
    step = Step(model, Quadratic(), t, parameters, (), memory)
    for _ in range(steps):
        step((torch.ones(1),), 0.01)
    return [p.detach() for p in parameters], memory.end(step.optimizers, parameters) if memory else {}


def test_steps_go_on_from_second_moments_and_first_moments_begin_anew() -> None:
    """Against AdamW's formula (Kingma and Ba 2015, algorithm 1) with a count of its own for each of the moments."""
    means = np.linspace(0.5, 2, 3 + 3 + 1).astype(np.float32)
    found, left = trained(Shared([True, True, True], {"moments": means}, 40))
    v0 = [
        torch.from_numpy(means[:3]).view(3, 1, 1, 1),
        torch.from_numpy(means[3:6]),
        torch.from_numpy(means[6:]).view([]),
    ]
    ends = []
    for i, (p, v, expected) in enumerate(zip(network().parameters(), v0, found, strict=True)):
        w, m, second = p.detach().double(), torch.zeros(p.shape).double(), v.double().expand(p.shape).clone()
        for k in range(1, 4):
            g = 2 * (w - 1) * (i + 1)
            m, second = 0.9 * m + 0.1 * g, 0.999 * second + 0.001 * g**2
            w = w - 0.01 * (m / (1 - 0.9**k)) / ((second / (1 - 0.999 ** (40 + k))).sqrt() + 1e-8)
        torch.testing.assert_close(expected.double(), w, rtol=1e-5, atol=1e-6)
        ends.append(second.reshape(len(second) if second.dim() else 1, -1).mean(1))
    np.testing.assert_allclose(left["moments"], torch.cat(ends).numpy(), rtol=1e-5)


def test_only_what_is_shared_goes_on_and_the_first_round_is_as_without() -> None:
    plain, _ = trained(None)
    first, left = trained(Shared([True, True, False], None, 0))
    assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    assert left["moments"].shape == (6,)
    later, _ = trained(Shared([True, False, False], {"moments": np.full(3, 9.0, np.float32)}, 40))
    assert [torch.equal(a, b) for a, b in zip(plain, later, strict=True)] == [False, True, True]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_kept_goes_on_as_if_no_round_had_ended(optimizer: str) -> None:
    whole, _ = trained(None, 5, optimizer)
    model = network()
    kept = trained(Kept(None), 2, optimizer, model)[1]["moments"]
    assert kept.shape == (Kept.layout(LAYOUT.size).size,)
    assert kept[0] == 2
    then, _ = trained(Kept(kept), 3, optimizer, model)
    assert all(torch.equal(a, b) for a, b in zip(whole, then, strict=True))


def test_muons_momentum_goes_on_and_the_rest_is_adamws() -> None:
    """Against Muon's formula (Jordan et al. 2024), with an exact polar factor in place of the iterations' near one."""
    momentum = np.linspace(-1, 1, 24).astype(np.float32)
    found, left = trained(Shared([True] * 3, {"moments": np.ones(4, np.float32), "momentum": momentum}, 40), 1, "muon")
    w = next(network().parameters()).detach()
    held = 0.95 * torch.from_numpy(momentum).view_as(w) + 0.05 * 2 * (w - 1)
    torch.testing.assert_close(torch.from_numpy(left["momentum"]), held.flatten(), rtol=1e-5, atol=1e-6)
    ahead = (0.95 * held + 0.05 * 2 * (w - 1)).view(3, 8)
    u, _, v = torch.linalg.svd(ahead, full_matrices=False)
    direction = (u @ v).view_as(w) * 0.2 * 8**0.5 * 0.01
    assert float((w - found[0] - direction).norm() / direction.norm()) < 0.3
    assert left["moments"].shape == (4,)  # of bias and scale
    adam, _ = trained(Shared([False, True, True], {"moments": np.ones(4, np.float32)}, 40), 1)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], adam[1:], strict=True))


@pytest.mark.parametrize("shape", [(5, 20), (20, 5), (7, 7)])
def test_a_momentum_is_made_nearly_orthogonal_and_keeps_its_directions(shape: tuple[int, int]) -> None:
    u, s, v = torch.linalg.svd(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    scale = torch.tensor([1e-6, 1.0, 1e6])[:, None]
    found = u.mT @ orthogonal(u @ torch.diag_embed(s * scale) @ v) @ v.mT
    singular = found.diagonal(dim1=1, dim2=2)
    assert bool(((singular > 0.5) & (singular < 1.3)).all())
    assert float((found - torch.diag_embed(singular)).abs().max()) < 1e-3
    assert (orthogonal(torch.zeros(1, *shape)) == 0).all()


def test_they_travel_as_a_mean_for_each_output_channel() -> None:
    via = ExtrasChannel(AVERAGED, LAYOUT)
    assert via.sizes == {"moments": 3 + 3 + 1}
    means = np.geomspace(1e-14, 1, 7).astype(np.float32)
    frame = via.encode({"moments": means}, 5)
    np.testing.assert_allclose(via.decode(frame, 5)["moments"], means, rtol=2**-8)
    with pytest.raises(FrameError, match="round"):
        via.decode(frame, 6)
    with pytest.raises(FrameError, match="layout"):
        ExtrasChannel(AVERAGED, Layout(LAYOUT.names, ((3, 2, 2, 2), (2,), (2,)))).decode(frame, 5)
    for wrong in (-1e-3, 5.0):
        with pytest.raises(FrameError, match="second moments must be from 0 to"):
            via.decode(via.encode({"moments": np.full(7, wrong, np.float32)}, 5), 5)


def test_a_momentum_travels_in_ternary_values_and_is_not_longer_than_the_gradients() -> None:
    via = ExtrasChannel(parse({"train.optimizer": "muon", "train.moments": "server"}), LAYOUT)
    assert via.sizes == {"moments": 3 + 1, "momentum": 24}
    momentum = np.random.default_rng(0).normal(size=24).astype(np.float32)
    momentum /= np.linalg.norm(momentum)
    frames = via.encode({"moments": np.ones(4, np.float32), "momentum": momentum}, 5)
    found = via.decode(frames, 5)["momentum"]
    assert len(np.unique(found)) == 3
    assert np.dot(found, momentum) > 0.7
    (chunk,) = via.chunks("momentum", memoryview(frames["momentum"]), 5)
    assert chunk.tobytes() == found.tobytes()
    frames = via.encode({"moments": np.ones(4, np.float32), "momentum": 5 * momentum}, 5)
    with pytest.raises(FrameError, match=r"a momentum of norm 4\.\d+; gradients are clipped to 1"):
        via.decode(frames, 5)


def test_the_mean_is_weighted_by_images_and_a_robust_one_is_not_moved_by_one_node() -> None:
    of = [("b", 1, np.full(2, 4.0, np.float32)), ("a", 3, np.full(2, 8.0, np.float32))]
    assert mean_of_nodes(of, robust=False).tolist() == [7.0, 7.0]
    assert mean_of_nodes(reversed(of), robust=False).tobytes() == mean_of_nodes(of, robust=False).tobytes()
    assert mean_of_nodes([*of, ("c", 10**6, np.full(2, 1e6, np.float32))], robust=True).tolist() == [8.0, 8.0]


ENDLESS = {"train__lr_schedule": "constant"}
C: dict[str, Any] = {"train__moments": "server", "num_server_rounds": 3, **ENDLESS}
MUON = {"train__optimizer": "muon"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"strategy": "feddm-lean"},
        {"exchange__parts": "usplit"},
        {**MUON},
        {"train__control": "scaffold", "strategy": "feddm-lean"},
        {**MUON, "strategy": "feddm-lean", "exchange__personal": "conv_in.*", "server__aggregation": "median"},
    ],
)
def test_every_node_goes_on_with_the_mean_and_a_run_that_is_resumed_has_the_same_bits(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    c = config(**C, **keys, out_dir=str(tmp_path))
    got: list[Extras] = []
    sent: list[tuple[str, int, Extras]] = []
    size = 0

    def record(message: Message, reply: Message) -> Message:
        nonlocal size
        number = int(str(message.content.config_records["task"]["round"]))
        down = message.content.array_records["weights"]
        assert ("moments" in down) == (number > 1)
        if number == 2:
            got.append(via.decode({name: down[name].data for name in via.sizes}, 2))
        up = {name: reply.content.array_records["weights"][name].data for name in (*via.sizes, "frame")}
        if number == 1:
            size += sum(map(len, up.values()))
            report = reply.content.config_records["report"]
            sent.append((str(report["name"]), int(str(report["images"])), via.decode(up, 1)))
        return reply

    server = feddm(c)
    via = ExtrasChannel(c, server._split.shared.layout)
    handlers = {i: on_train(h, record) for i, h in nodes(c).items()}
    rounds = server.run(LocalGrid(handlers))
    first = next(rounds)
    assert first.bytes_up == size
    middle = server.checkpoint()
    *_, last = rounds
    robust = c.server.robust
    expected = mean_of_nodes(((name, n, moments["moments"]) for name, n, moments in sent), robust=robust)
    assert (expected > 0).all()
    for moments in got:
        np.testing.assert_allclose(moments["moments"], expected, rtol=2**-8)
        if "momentum" in moments:
            mean = mean_of_nodes(((name, n, moments["momentum"]) for name, n, moments in sent), robust=robust)
            assert np.dot(moments["momentum"], mean) > 0.7 * np.linalg.norm(mean) * np.linalg.norm(moments["momentum"])
    if len(keys) < 2 and c.server.optimizer == "averaging" and not c.keeps_personal and c.exchange.parts == "full":
        assert last.weights.tobytes() != run(config(**C | keys | {"train__moments": "reset"}))[-1].weights.tobytes()
    other = feddm(c)
    other.restore(middle)
    *_, again = other.run(LocalGrid(nodes(c), backwards=True))
    assert again.weights.tobytes() == last.weights.tobytes()


@pytest.mark.parametrize("lacking", ["moments", "momentum"])
@pytest.mark.parametrize(("content", "reason"), [(None, "malformed"), (b"noise" * 9, "bad-frame"), (b"", "bad-frame")])
def test_a_reply_with_wrong_moments_is_no_reply(content: bytes | None, reason: str, lacking: str) -> None:
    c = config(**C | MUON | {"num_server_rounds": 1})

    def change(message: Message, reply: Message) -> Message:
        arrays = {**reply.content.array_records["weights"]}
        del arrays[lacking]
        if content is not None:
            arrays[lacking] = Array("uint8", (len(content),), "feddm.frame", content)
        records = {"weights": ArrayRecord(arrays), "report": reply.content["report"]}
        return Message(RecordDict(records), reply_to=message)

    handlers = nodes(c)
    handlers[997] = on_train(handlers[997], change)
    (done,) = run(c, handlers)
    assert done.failures == {reason: 1}
    assert done.weights.tobytes() == weights_without_node_3(c)


def test_the_servers_control_variate_is_the_mean_of_the_nodes_own() -> None:
    """Each node counts by its images, whether it was asked in a round or not."""
    c = config(train__control="scaffold", num_server_rounds=4, fraction_train=0.5, **ENDLESS)
    own: dict[str, tuple[int, Vector]] = {}
    size = 0

    def record(message: Message, reply: Message) -> Message:
        nonlocal size
        report = reply.content.config_records["report"]
        frames = reply.content.array_records["weights"]
        number, name = int(str(report["round"])), str(report["name"])
        change = via.decode({"control": frames["control"].data}, number)["control"]
        own[name] = int(str(report["images"])), own.get(name, (0, np.float32(0)))[1] + change
        size += len(frames["control"].data) + len(frames["frame"].data)
        return reply

    server = feddm(c)
    via = ExtrasChannel(c, server._split.shared.layout)
    rounds = [*server.run(LocalGrid({i: on_train(h, record) for i, h in nodes(c).items()}))]
    assert len(own) > 2
    total = sum(node.images for node in server.nodes)
    expected = sum(images / total * vector for images, vector in own.values())
    found = server.checkpoint().tensors["control"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    without = run(config(num_server_rounds=4, fraction_train=0.5, **ENDLESS))
    assert sum(r.bytes_up for r in rounds) == size == pytest.approx(2 * sum(r.bytes_up for r in without), rel=0.1)
    assert rounds[-1].weights.tobytes() != without[-1].weights.tobytes()


def test_what_no_round_goes_on_with_is_not_sent() -> None:
    c = config(**MUON, train__control="scaffold", num_server_rounds=3)
    server = feddm(c)
    first, second, last = server.run(LocalGrid(nodes(c)))
    plain = run(config(**MUON, train__moments="reset", num_server_rounds=1))[0]
    assert first.bytes_up == pytest.approx(second.bytes_up, rel=0.01)
    assert last.bytes_up == pytest.approx(plain.bytes_up, rel=0.01)
    assert first.bytes_up > 2 * last.bytes_up * 0.95
    assert last.bytes_down == pytest.approx(second.bytes_down, rel=0.01)


def test_a_control_variate_is_no_longer_than_clipped_gradients_whatever_a_node_says() -> None:
    """Otherwise the nodes would refuse it, for good."""
    c = config(train__control="scaffold", num_server_rounds=4, **ENDLESS)

    def lie(message: Message, reply: Message) -> Message:
        number = int(str(reply.content.config_records["report"]["round"]))
        frame = via.encode({"control": np.full(size, 1.9 / size**0.5, np.float32)}, number)["control"]
        arrays = {**reply.content.array_records["weights"], "control": Array("uint8", (len(frame),), "", frame)}
        records = {"weights": ArrayRecord(arrays), "report": reply.content["report"]}
        return Message(RecordDict(records), reply_to=message)

    server, handlers = feddm(c), nodes(c)
    via, size = ExtrasChannel(c, server._split.shared.layout), server._split.shared.layout.size
    handlers[997] = on_train(handlers[997], lie)
    rounds = [*server.run(LocalGrid(handlers))]
    assert all(r.clients_ok == 4 for r in rounds)
    assert np.linalg.norm(server.checkpoint().tensors["control"]) <= 1.001


def test_a_reply_whose_moments_cannot_be_added_leaves_nothing() -> None:
    c = config(**C | MUON | {"num_server_rounds": 1, "train__max_grad_norm": 1e12})

    def change(message: Message, reply: Message) -> Message:
        moments = via.decode({name: reply.content["weights"][name].data for name in via.sizes}, 1)
        moments["momentum"] = np.full(via.sizes["momentum"], 1e7, np.float32)
        arrays = {**reply.content["weights"]}
        arrays |= {name: Array("uint8", (len(f),), "", f) for name, f in via.encode(moments, 1).items()}
        return Message(
            RecordDict({"weights": ArrayRecord(arrays), "report": reply.content["report"]}), reply_to=message
        )

    server, handlers = feddm(c), nodes(c)
    via = ExtrasChannel(c, server._split.shared.layout)
    handlers[997] = on_train(handlers[997], change)
    (done,) = server.run(LocalGrid(handlers))
    assert done.failures == {"bad-update": 1}
    assert done.weights.tobytes() == weights_without_node_3(c)


def test_adapters_are_matrices_alone_and_go_on_with_muons_momentum(tmp_path: Path) -> None:
    c = config()
    pipelines.save(networks.build(c, {}), c, {}, tmp_path / "model", "")
    lora = config(**C | MUON, model__init_from=str(tmp_path / "model"), model__lora_rank=2)
    files = pretrained.fetch(lora, tmp_path)
    network = networks.build(lora, files)
    parts = split_of(parameters.layout(network), lora)
    assert [*ExtrasChannel(lora, parts.shared.layout).sizes] == ["momentum"]
    server = FedDM(lora, parts.shared.take(parameters.to_vector(network)), parts, uuid.uuid4().hex, files)
    assert all(r.clients_ok == 4 for r in server.run(LocalGrid(nodes(lora))))


def test_control_variates_lead_to_the_optimum_of_all_where_averaging_does_not() -> None:
    """Karimireddy et al. 2020, theorem III, on two quadratics of unequal curvature, by gradient descent."""
    curvatures, optima = torch.tensor([1.0, 4.0]), torch.tensor([1.0, -1.0])
    best = float((curvatures * optima).sum() / curvatures.sum())

    def trained_to(controlled: bool) -> float:
        w, own = torch.zeros(()), torch.zeros(2)
        for _ in range(200):
            ends, means = [], []
            for a, x, c in zip(curvatures, optima, own, strict=True):
                p = nn.Parameter(w.clone())
                term = Control((own.mean() - c if controlled else torch.zeros(())).reshape(1), 1e9)
                term.start([p])
                for _ in range(5):
                    p.grad = (a * (p - x)).detach()
                    term.add([p])
                    with torch.no_grad():
                        p -= 0.1 * p.grad
                ends.append(p.detach())
                means.append(term.mean(5)[0])
            w, own = torch.stack(ends).mean(), torch.stack(means)
        return float(w)

    assert trained_to(True) == pytest.approx(best, abs=1e-4)
    assert abs(trained_to(False) - best) > 0.1


def test_a_share_of_the_last_global_step_is_added_along_the_way() -> None:
    """FedAdamW, arXiv 2510.27486."""
    model = network()
    parameters = [*model.parameters()]
    before = [p.detach().clone() for p in parameters]
    along = torch.linspace(-1, 1, LAYOUT.size)
    step = Step(model, Quadratic(), parse({}).train, parameters, (), None, along)
    for _ in range(3):
        step((torch.ones(1),), 0.0)
    moved = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(parameters, before, strict=True)])
    torch.testing.assert_close(moved, 3 * along)


def test_what_nodes_keep_is_as_of_the_last_reply_that_counted() -> None:
    c = config(train__moments="node", num_server_rounds=4)
    server = feddm(c)
    rounds = server.run(LocalGrid(nodes(c)))
    next(rounds)
    next(rounds)
    middle = server.checkpoint()
    *_, last = rounds  # nodes have kept later ones now
    other = feddm(c)
    other.restore(middle)
    *_, again = other.run(LocalGrid(nodes(c), backwards=True))
    assert again.weights.tobytes() == last.weights.tobytes()
    assert again.state_lost == 0


@pytest.mark.parametrize("keys", [{}, {"strategy": "feddm-lean", "exchange__personal": "conv_in.*"}])
def test_the_last_step_is_of_the_global_weights_and_resumed_to_the_same_bits(keys: dict[str, Any]) -> None:
    c = config(train__alignment=0.5, num_server_rounds=4, **keys)
    server = feddm(c)
    started = server.run(LocalGrid(nodes(c)))
    first, second = next(started), next(started)
    middle = server.checkpoint()
    *_, last = started
    other = feddm(c)
    other.restore(middle)
    *_, again = other.run(LocalGrid(nodes(c), backwards=True))
    assert again.weights.tobytes() == last.weights.tobytes()
    if not keys:  # plain averaging of nodes that learn nothing is the share alone
        still = config(train__alignment=0.5, num_server_rounds=3, train__learning_rate=1e-30)
        resting = feddm(still)
        resting.restore(middle)
        (third,) = resting.run(LocalGrid(nodes(still)))
        step = second.weights - first.weights
        np.testing.assert_allclose(third.weights - second.weights, 0.5 * step, atol=1e-6)


@pytest.mark.parametrize("keys", [{"train__alignment": 0.5}, {"train__moments": "node"}])
def test_a_reply_that_did_not_count_leaves_no_trace_at_the_node(keys: dict[str, Any]) -> None:
    c = config(**keys, num_server_rounds=3)

    def lost(handle: Handler, *, trained: bool) -> Handler:
        def answer(message: Message) -> Message | None:
            kind = message.metadata.message_type
            if kind != "train" or message.content.config_records["task"]["round"] != 2:
                return handle(message)
            if trained:
                handle(message)
            return Message(Error(2, "broken"), reply_to=message)

        return answer

    found = set()
    for trained in (True, False):
        handlers = nodes(c)
        handlers[997] = lost(handlers[997], trained=trained)
        done = run(c, handlers)
        assert done[1].failures == {"exception": 1}
        assert done[2].state_lost == 0
        found.add(done[2].weights.tobytes())
    assert len(found) == 1


def test_they_are_of_adamw() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.moments = 'server' with train\.optimizer = 'adamw8bit': is for adamw"
    ):
        parse({"train.moments": "server", "train.optimizer": "adamw8bit"})
