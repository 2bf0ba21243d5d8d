"""Images that belong together are held out together, whatever else happens to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from local_grid import LocalGrid, config, nodes
from PIL import Image

from feddm_flwr.config import ConfigError, RunConfig, parse
from feddm_flwr.data.node_data import NodeData, load_node
from feddm_flwr.privacy.accounting import Steps, epsilon
from feddm_flwr.server.federation.roster import Roster

KEYS = {"data.name": "own", "data.image-size": 4, "data.channels": 1, "data.flip": False}


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


def load(c: RunConfig, path: Path, root: Path) -> NodeData:
    return load_node(c.data, c.seed, None, str(path), root)


def values(images: np.ndarray) -> list[int]:
    return [int(image.flat[0]) for image in images]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=12),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    seed=st.integers(0, 99),
)
def test_no_group_is_on_both_sides(
    sizes: list[int], share: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("groups")
    owner = [group for group, size in enumerate(sizes) for _ in range(size)]
    for i, group in enumerate(owner):
        save(folder / "images" / "class" / f"patient-{group}" / f"{i}.png", i)
    c = parse({**KEYS, "data.group-column": "folder", "data.eval-fraction": share, "seed": seed})
    try:
        found = load(c, folder / "images", folder / "root")
    except ConfigError:
        assert max(sizes) > (1 - share) * sum(sizes) - 1  # one group has nearly all
        return
    train, held_out = ([owner[v] for v in values(images)] for images in (found.train, found.held_out))
    assert not {*train} & {*held_out}
    assert len(train) + len(held_out) == len(owner)
    assert len(held_out) >= share * len(owner)
    assert [train.count(group) for group in dict.fromkeys(train)] == [*found.groups]
    assert len([*dict.fromkeys(train)]) == found.records
    places = np.repeat(np.arange(len(found.groups)), found.groups)  # one group after the other
    assert len({(a, b) for a, b in zip(places, train, strict=True)}) == len(found.groups)
    again = load(c, folder / "images", folder / "elsewhere")
    assert again.train.tobytes() == found.train.tobytes()


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "shard", "natural"])
@settings(max_examples=4)
@given(patients=st.integers(20, 40), seed=st.integers(0, 99))
def test_the_nodes_of_a_simulation_share_no_group(
    partition: str, patients: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, random = tmp_path_factory.mktemp("dealt"), np.random.default_rng(seed)
    owner = random.integers(0, patients, 250)
    table = {"image": [[[i] * 4] * 4 for i in range(250)], "patient": [f"P{p:02}" for p in owner]}
    Dataset.from_dict({**table, "label": random.integers(0, 6, 250)}).to_parquet(folder / "all.parquet")
    own = {"dirichlet": {"data.alpha": 100.0}, "pathological": {"data.classes-per-node": 3}}.get(partition, {})
    keys = {**KEYS, **own, "data.name": str(folder / "all.parquet"), "data.partition": partition, "seed": seed}
    c = parse({**keys, "data.group-column": "patient"})
    found = [load_node(c.data, seed, (i, 3), None, folder / "root") for i in range(3)]
    sides = [{*owner[values(images)]} for node in found for images in (node.train, node.held_out)]
    assert all(sides)
    assert sum(map(len, sides)) == len({*np.concatenate([[*side] for side in sides])})
    images = [v for node in found for v in values(np.concatenate([node.train, node.held_out]))]
    assert len({*images}) == len(images) >= 200
    if partition in ("iid", "natural"):
        assert len(images) == 250
        sizes = [len(node.train) + len(node.held_out) for node in found]
        assert max(sizes) - min(sizes) <= np.bincount(owner).max()


def test_a_column_of_a_table_says_it_as_well_and_who_is_held_out_stays_so(tmp_path: Path) -> None:
    cells = [[[i] * 4] * 4 for i in range(60)]
    patients = [f"P{i % 12}" for i in range(60)]
    c = parse({**KEYS, "data.group-column": "patient", "data.eval-fraction": 0.2})

    def held_out(count: int) -> set[str]:
        path = tmp_path / f"{count}.parquet"
        Dataset.from_dict({"image": cells[:count], "patient": patients[:count]}).to_parquet(path)
        found = load(c, path, tmp_path / "root")
        assert sum(found.groups) == len(found.train)
        return {patients[v] for v in values(found.held_out)}

    few, many = held_out(48), held_out(60)
    assert few == many  # more images of the same patients move nobody
    assert not [path for path in (tmp_path / "root").rglob("*.json") if "P1" in path.read_text()]  # no name is written


def test_nodes_say_how_many_groups_they_have_and_the_unit_of_privacy_is_the_group() -> None:
    keys = {"privacy__mechanism": "dp-sgd", "privacy__noise_multiplier": 1.0, "privacy__multiplicity": 2}
    c = config(**keys, data__group_column="label", num_server_rounds=1)
    roster = Roster(c)
    roster.wait(LocalGrid(nodes(c)), first=True)
    from local_grid import run

    (done,) = run(c)
    assert 4 <= sum(node.groups for node in roster.nodes.values()) <= 6  # of ten digits each node holds one out
    for name, (own, _) in done.epsilons.items():
        records = roster.nodes[name].groups
        spent = Steps(min(1.0, c.train.batch_size / records), 1.0, c.train.local_steps)
        assert own == pytest.approx(epsilon([spent], 1e-5))


@pytest.mark.parametrize("column", ["patient", "folder"])
def test_a_column_that_is_not_there_is_named(column: str) -> None:
    with pytest.raises(ConfigError, match=f"data.group-column = '{column}': no such column"):
        Roster(c := config(data__group_column=column)).wait(LocalGrid(nodes(c)), first=True)


def test_one_group_cannot_be_divided(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / "images" / "patient" / f"{i}.png", i)
    c = parse({**KEYS, "data.group-column": "folder"})
    with pytest.raises(ConfigError, match="has 1 groups; too few to hold some out"):
        load(c, tmp_path / "images", tmp_path / "root")
