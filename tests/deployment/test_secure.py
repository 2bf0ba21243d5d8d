"""Secure sums between real SuperNodes with keys of their own, which are killed between any two messages of a round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from federation import Federation, wait

SITES = ("north", "south", "east", "west")
STAGES = ("none", "keys", "shares", "masked", "confirm", "opened")
SECURE = {"strategy": "feddm-secure", "min_nodes": 4, "min_replies": 3, "round_timeout": 120}


def own(keys: Path, site: str, peers: Path | None = None) -> str:
    return f'secure-key="{keys / "nodes" / site}" secure-peers="{peers or keys / "peers.pub"}"'


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one = Federation(tmp_path_factory.mktemp("federation"), SITES, own)
    yield one
    one.close()


def stage(federation: Federation, site: str) -> tuple[int, int]:
    """The round that a node's memory of sums is at, and how far it is in it."""
    files = sorted((federation.folder / f"{site}-state").glob(f"*/{site}/secure.json"), key=lambda f: f.stat().st_mtime)
    memory = json.loads(files[-1].read_text()) if files else {"session": {}, "opened": {}}
    session = memory["session"]
    training = session.get("training", ["0/0", *memory["opened"]][-1])
    return int(training.partition("/")[0]), STAGES.index(session.get("stage", "none"))


def is_at(federation: Federation, site: str, goal: tuple[int, int]) -> bool:
    return stage(federation, site) >= goal


def test_nodes_are_killed_between_any_two_messages_and_every_sum_is_opened(federation: Federation) -> None:
    """In one round a node after it shared its secrets, in the next one after it masked; each is back soon."""
    name = "killed"
    run = federation.start_run(run_name=name, num_server_rounds=2, **SECURE)
    for number, at, site in ((1, "shares", "south"), (2, "masked", "east")):
        goal = number, STAGES.index(at)
        wait(partial(is_at, federation, site, goal), f"{site} at {at} of round {number}")
        federation.crash(site)
    said, _ = run.communicate(timeout=900)
    assert run.returncode == 0, said
    rows = federation.rows(name)
    assert [row["round"] for row in rows] == [1, 2]
    assert min(row["clients_ok"] for row in rows) >= 3
    assert all(0 < row["train_loss"] < 3 for row in rows)
    assert all("eval_loss" not in node for row in rows for node in row["nodes"].values())


def test_a_key_that_is_not_the_one_a_node_knows_is_found_out(federation: Federation) -> None:
    """What a server would do that wants to read north's shares: the others' lists have another key for it."""
    lines = (federation.keys / "peers.pub").read_text().splitlines()
    keys = {line.split()[-1]: line.rpartition(" ")[0] for line in lines}
    swapped = federation.folder / "swapped.pub"
    swapped.write_text("\n".join(f"{keys['south' if site == 'north' else site]} {site}" for site in keys))
    for site in SITES[1:]:
        federation.stop(site)
        federation.start_node(site, own=own(federation.keys, site, swapped))
    code, said = federation.run(run_name="swapped", num_server_rounds=1, max_round_retries=0, **SECURE)
    assert code == 0, said
    assert "refuses the keys of north: its signature is not of the key that this node knows" in said
    (row,) = federation.rows("swapped")
    assert (row["clients_ok"], row["clients_failed"]) == (3, 1)
