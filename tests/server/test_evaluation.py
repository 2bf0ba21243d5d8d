"""Judging a global model without an image leaving its node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from local_grid import Handler, LocalGrid, config, nodes, run_server
from torch import nn

from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.data.node_data import load_all
from feddm_flwr.evaluation import features, lipschitz, statistics, utility
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.evaluation.grids import labels_like
from feddm_flwr.evaluation.memorization import near_by_chance, near_copies, separability
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.models import networks, parameters
from feddm_flwr.protocol.replies import levels_of
from feddm_flwr.server.evaluation import GlobalEvaluation, check_reference
from feddm_flwr.server.final_evaluation import evaluate_at_nodes
from feddm_flwr.server.strategy import FedDM


def federation(c: RunConfig) -> tuple[GlobalModel, FedDM]:
    network = networks.build(c, {})
    parts = split_of(parameters.layout(network), c)
    return GlobalModel(network, c, {}), FedDM(c, parameters.to_vector(network), parts, "0" * 32)


def on_evaluate(handle: Handler, change: Any) -> Handler:
    def changed(message: Message) -> Message | None:
        reply = handle(message)
        assert reply
        if message.metadata.message_type == "evaluate":
            change(reply.content)
        return reply

    return changed


def huge(content: RecordDict) -> None:
    """Sums that would make the federation's infinite."""
    frame = content.array_records["weights"]["frame"]
    values = np.frombuffer(frame.data).copy()
    values[1:20] = 1e308
    content["weights"] = ArrayRecord({"frame": Array("uint8", (len(frame.data),), "feddm.frame", values.tobytes())})


@pytest.mark.parametrize("kind", ["classifier", "random"])
def test_the_reference_of_a_federation_is_that_of_the_pooled_images(kind: str, tmp_path: Path) -> None:
    c = config(eval__features=kind, eval__samples=32, sample__steps=3)
    of, feddm = federation(c)
    judge = GlobalEvaluation(of, tmp_path)
    judge.refer(feddm, LocalGrid(nodes(c)))
    images, classes, _ = load_all(c.data)
    network = features.read(judge.recipe).build()
    pooled = statistics.statistics(network(images), classes)
    assert judge._real
    assert judge._real.count == pooled.count == 1438
    for ours, theirs in ((judge._real.second, pooled.second), (judge._real.third, pooled.third)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
    found = judge.figures(feddm.averaged)
    assert found["fid"] > 0
    assert found["lipschitz"] > 0
    assert 0 <= found["coverage"] <= 1
    assert {*found["coverage_by_class"]} == {str(i) for i in range(10)}
    # What was gathered is kept: no node is asked again.
    again = GlobalEvaluation(of, tmp_path)
    again.refer(feddm, LocalGrid({}))
    assert again.figures(feddm.averaged) == found
    for keys, said in (
        ({"eval__features": "dinov2"}, f"eval.features = 'dinov2': was '{kind}' in the run to resume"),
        ({"eval__samples": 33}, "eval.samples = 33: was 32 in the run to resume, and must stay so"),
        ({"sample__steps": 4}, "sample.steps = 4: was 3 in the run to resume"),
    ):
        other = config(**{"eval__features": kind, "eval__samples": 32, "sample__steps": 3} | keys)
        with pytest.raises(ConfigError, match=said):
            check_reference(other, tmp_path)


def test_a_resume_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    c = config(
        num_server_rounds=1, run_name="judged", out_dir=str(tmp_path), eval__features="random", eval__samples=16,
        eval__audit=True, sample__steps=2, sample__count=1,
    )  # fmt: skip
    run_server(c)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"eval.samples = 17: was 16 in the run to resume"):
        run_server(replace(c, resume=True, eval=replace(c.eval, samples=17)))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_sum_does_not_depend_on_who_answers_first_and_bad_sums_cost_their_node(tmp_path: Path) -> None:
    c = config(eval__features="random", data__eval_fraction=0.0)
    sums = []
    for folder, backwards in (("one", False), ("two", True)):
        (tmp_path / folder).mkdir()
        of, feddm = federation(c)
        handlers = nodes(c)
        handlers[998] = on_evaluate(handlers[998], lambda content: content.array_records.pop("weights"))
        handlers[999] = on_evaluate(handlers[999], huge)
        judge = GlobalEvaluation(of, tmp_path / folder)
        judge.refer(feddm, LocalGrid(handlers, backwards=backwards))
        sums.append((tmp_path / folder / "reference" / "sums").read_bytes())
    assert sums[0] == sums[1]
    assert json.loads((tmp_path / "one" / "reference" / "facts.json").read_text())["without"] == ["node-1", "node-2"]


def test_small_nodes_give_no_sums(tmp_path: Path) -> None:
    c = config(eval__features="random", eval__min_images=10_000)
    of, feddm = federation(c)
    with pytest.raises(RuntimeError, match=r"no node gave sums of features \(eval.min-images = 10000\)"):
        GlobalEvaluation(of, tmp_path).refer(feddm, LocalGrid(nodes(c)))


def test_a_classifier_needs_images_on_the_server(tmp_path: Path) -> None:
    own = {"data__name": "/xrays", "data__image_size": 8, "data__channels": 1}
    of, _ = federation(config(eval__features="classifier", **own))
    with pytest.raises(ConfigError, match=r"eval.features = 'classifier': the server has no images to train it on"):
        GlobalEvaluation(of, tmp_path)


def test_nodes_say_what_samples_are_good_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "_STEPS", 100)
    keys = {"data__classes": ",".join("0123456789"), "model__class_conditional": True, "eval__utility": True}
    c = config(**keys, eval__features="random", eval__samples=40, sample__steps=3, num_server_rounds=1)
    of, feddm = federation(c)
    list(feddm.run(LocalGrid(nodes(c))))
    said = evaluate_at_nodes(feddm, LocalGrid(nodes(c)), of, GlobalEvaluation(of, tmp_path).recipe)
    assert {*said.utility} == {f"node-{i}" for i in range(4)}
    assert not said.audit
    for node in feddm.nodes:
        found, site = said.utility[node.name], said.figures()["sites"][node.name]
        assert found.images == found.looked_at == node.held_out == site["images"]
        assert found.by_own > 0.7 * found.images  # digits are easily told apart
        assert found.by_samples < 0.7 * found.images  # these samples are noise
        assert site["eval_loss"] > 0


def test_the_end_of_a_run_is_evaluated_by_the_nodes(tmp_path: Path) -> None:
    c = config(eval__features="random", eval__audit=True, eval__samples=32, sample__steps=3)
    of, feddm = federation(c)
    grid, judge = LocalGrid(nodes(c)), GlobalEvaluation(of, tmp_path)
    done = list(feddm.run(grid))
    said = evaluate_at_nodes(feddm, grid, of, judge.recipe)
    found = said.figures()
    assert {*found["audit"]} == {f"node-{i}" for i in range(4)}
    assert all(0 <= a["near"] <= 32 and 0.3 < a["members_auc"] < 0.7 for a in found["audit"].values())
    assert all(a["by_chance"] == pytest.approx(32 * 1.35 / 37, rel=0.05) for a in found["audit"].values())
    assert 0 < found["eval_loss"] < done[0].eval_loss
    assert feddm.bytes_other > 4 * 4 * len(feddm.averaged)  # the averaged weights went to four nodes
    row = done[1].figures()
    assert len(row["eval_levels"]) == 10
    assert np.mean(row["eval_levels"]) == pytest.approx(row["eval_loss"], rel=0.05)
    assert {n["eval_loss"] > 0 for n in row["nodes"].values()} == {True}
    assert row["eval_spread"] > 0
    assert row["drift"] > 0
    assert row["contraction"] > 0


def test_copies_are_counted_and_others_are_not() -> None:
    trained, unseen = torch.randn(500, 8), torch.randn(500, 8)
    copies = trained[:20] + 1e-3
    assert near_copies(torch.cat([copies, torch.randn(80, 8)]), trained, unseen) in range(20, 26)
    assert near_copies(torch.randn(200, 8), trained, unseen) <= 10
    twice = torch.cat([unseen, trained[:50]])  # held-out images that are among the training images, too
    assert near_copies(trained[:20], trained, twice) == 20


def test_how_many_are_near_by_chance_is_known_for_few_images() -> None:
    torch.manual_seed(0)
    found = [near_copies(torch.randn(100, 8), torch.randn(50, 8), torch.randn(20, 8)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(near_by_chance(100, 20), rel=0.2)


@pytest.mark.parametrize(
    "text", ["[" + "1" + "0" * 400 + "]", "[1]", "x", "[[]]", '["a"]', "[-1,1,1,1,1,1,1,1,1,1]", "{}"]
)
def test_what_is_no_list_of_losses_is_none(text: str) -> None:
    assert levels_of(text) == []
    assert levels_of(json.dumps([0.5] * 10)) == [0.5] * 10


def test_a_lower_loss_on_members_tells_them_apart() -> None:
    losses = torch.rand(1000)
    assert separability(losses, losses) == 0.5
    assert separability(losses - 1, losses) == 1
    assert separability(torch.rand(5000), torch.rand(5000)) == pytest.approx(0.5, abs=0.03)


def test_the_lipschitz_gauge_finds_the_largest_singular_value() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(12, 12))

        def forward(self, x: torch.Tensor, t: torch.Tensor, labels: object) -> Any:
            out = type("Out", (), {})()
            out.sample = (x.flatten(1) @ self.matrix.T).view_as(x)
            return out

    torch.manual_seed(0)
    network = Linear()
    found = lipschitz.lipschitz(network, torch.randn(4, 3, 2, 2), torch.zeros(4), None)
    largest = float(torch.linalg.svdvals(network.matrix.detach())[0])
    assert 0.95 * largest <= found <= 1.001 * largest
    assert network.matrix.requires_grad


def test_labels_are_drawn_in_proportion() -> None:
    labels = labels_like({"a": 30, "c": 10}, ["a", "b", "c"], 8)
    assert labels == [0] * 6 + [2] * 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"eval__audit": True}, "eval.audit = true with eval.features = 'none'"),
        ({"eval__utility": True}, "eval.utility = true: needs a whole model with classes"),
        ({"eval__keep_best": "fid"}, "eval.keep-best = 'fid' with eval.features = 'none'"),
        ({"eval__keep_best": "kid", "eval__features": "dinov2"}, "their KID takes images"),
        ({"eval__features": "random", "exchange__parts": "udec"}, "the server draws no samples"),
        ({"stage": "autoencoder", "data__eval_fraction": 0.0}, "data.eval-fraction = 0.0 with stage = 'autoencoder'"),
        ({"stage": "autoencoder", "exchange__personal": "*.bias"}, "exchange.personal = '*.bias' with stage"),
    ],
)
def test_what_cannot_be_judged_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**keys)
    assert said in str(caught.value)


def test_copies_are_found_among_all_training_images() -> None:
    torch.manual_seed(0)
    trained, unseen = torch.randn(9000, 8), torch.randn(500, 8)
    assert near_copies(trained[-20:], trained, unseen) == 20


def test_sums_that_contradict_each_other_are_refused() -> None:
    sums = statistics.statistics(torch.randn(50, 4) + 3)
    wrong = replace(sums, first=2 * sums.first)
    with pytest.raises(ValueError, match="statistics that no images have"):
        statistics.unpack(wrong.pack(), 4, [])
    assert statistics.unpack(sums.pack(), 4, []).count == 50
