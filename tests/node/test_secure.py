"""A node in a secure sum, against a server that tells nodes different things."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feddm_flwr.config import parse
from feddm_flwr.node.secure import SecureNode
from feddm_flwr.privacy.secure_sum import SecureSumError
from feddm_flwr.protocol.tasks import CONFIRM, KEYS, OPEN, SHARES, SecureTask, TrainTask

RUN = "a" * 32


class Server:
    """Asks the nodes what it likes, in one session after the other."""

    def __init__(self, folder: Path, names: str, **keys: Any) -> None:
        config = parse({"strategy": "feddm-secure", "num-server-rounds": 200, "min-nodes": 3, **keys})
        own = {name: {"partition-id": 0, "state-path": str(folder / name)} for name in names}
        self.nodes = {name: SecureNode(config, own[name], name, RUN) for name in names}
        self.session, self.round, self.repeat = "s1", 1, 0
        self.views: dict[str, dict[str, Any]] = {}
        self.sealed: dict[str, dict[str, str]] = {}
        self.refusals: list[str] = []

    def ask(self, name: str, stage: str, content: Any = None) -> dict[str, Any]:
        task = SecureTask(stage, RUN, self.round, self.repeat, self.session, json.dumps(content))
        return self.nodes[name].answer(task)

    def begin(self, views: dict[str, str] | None = None) -> None:
        """Keys and shares; a node is shown those of its view."""
        keys = {name: self.ask(name, KEYS) for name in self.nodes}
        kinds = ("sealing", "masking", "signature")
        public = {name: {kind: said[kind] for kind in kinds} for name, said in keys.items()}
        self.views = {n: {o: public[o] for o in (views or {}).get(n, [*self.nodes])} for n in self.nodes}
        self.sealed = {name: self.ask(name, SHARES, view) for name, view in self.views.items()}

    def mask(self, name: str, names: str, acked: int = 0, about: str = "") -> np.ndarray:
        """What a node sends that is told that it is summed with these, of an update of zeros."""
        images = dict.fromkeys(names, 10)
        sealed = {other: self.sealed[other].get(name, "") for other in names if other != name}
        said = json.dumps({"session": self.session, "images": images, "sealed": sealed})
        words = np.zeros(10, np.uint64)
        task = TrainTask(RUN, self.round, 0, False, "all", acked, acked, 0, 0, "{}", "", 0, self.repeat, said)
        self.nodes[name].mask(words, task, {"weights": about})
        return words

    def open(self, told: dict[str, str]) -> dict[str, dict[str, Any]]:
        """What nodes tell of masks that are told that these are left; tags go to everybody."""
        tags = {name: self.ask(name, CONFIRM, sorted(left)) for name, left in told.items()}
        found = {}
        for name in told:
            said = {other: tags[other][name] for other in tags if name in tags[other]}
            try:
                found[name] = self.ask(name, OPEN, said)
            except SecureSumError as error:
                self.refusals.append(str(error))
        return found

    def whole(self, names: str | None = None, **more: Any) -> dict[str, dict[str, Any]]:
        names = names or "".join(self.nodes)
        self.begin()
        for name in names:
            self.mask(name, names, **more)
        return self.open(dict.fromkeys(names, names))


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_masks_of_one_kind_are_told_at_most_whoever_is_said_to_be_left(size: int, tmp_path: Path) -> None:
    """Half of the nodes, or any of them, are told that node a has vanished."""
    names = "abcdef"[:size]
    for number, count in enumerate(range(1, size)):
        for session, some in enumerate(itertools.islice(itertools.combinations(names[1:], count), 2)):
            server = Server(tmp_path / f"{size}-{number}-{session}", names, **{"min-replies": 3})
            server.begin()
            for name in names:
                server.mask(name, names)
            views = {name: names.replace("a", "") if name in some else names for name in names}
            if min(map(len, views.values())) < max(3, size // 2 + 1):
                continue
            told = server.open(views)
            assert len({views[name] for name in told}) <= 1


def test_a_node_whose_sum_is_said_to_be_of_others_tells_nothing_and_is_not_told_of(tmp_path: Path) -> None:
    """Node a believes that it is summed with four others; of nine, some are told that these have vanished, so that all
    of its masks could be had."""
    names = "abcdefghi"
    server = Server(tmp_path, names, **{"min-nodes": 9})
    server.begin()
    for name in names:
        server.mask(name, "abcde" if name == "a" else names)
    told = server.open({"a": "abcde", **{u: f"{u}afghi" for u in "bcde"}, **dict.fromkeys("fghi", "afghi")})
    assert told == {}
    assert all("were told the same; at least 5 are needed" in why for why in server.refusals)


def test_a_node_that_is_shown_fewer_nodes_can_read_no_shares(tmp_path: Path) -> None:
    server = Server(tmp_path, "abcdefghi", **{"min-nodes": 5, "min-replies": 3})
    server.begin({"a": "abcde"})
    with pytest.raises(SecureSumError, match="cannot be opened"):
        server.mask("a", "abcde")
    with pytest.raises(SecureSumError, match="cannot be opened"):
        server.mask("b", "abcdefghi")


def test_a_training_is_told_of_with_one_set_of_nodes_one_state_and_one_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feddm_flwr.node.secure._REMEMBERED", 5)
    server = Server(tmp_path, "abcde", **{"min-replies": 3})
    assert len(server.whole(about="w")) == 5
    for session, changes, why in (
        ("s2", {"names": "abcd", "about": "w"}, "of other nodes"),
        ("s3", {"about": "x"}, "of other weights"),
        ("s4", {"about": "w", "acked": 1}, "of other weights"),
    ):
        server.session = session
        with pytest.raises(SecureSumError, match=why):
            server.whole(**changes)
    server.session = "s5"
    assert len(server.whole(about="w")) == 5  # as after a restart
    for server.repeat in (-1, 3):
        server.session = f"r{server.repeat}"
        with pytest.raises(SecureSumError, match="was repeated"):
            server.whole(about="w")
    server.repeat = 0
    for server.round in range(2, 8):
        server.session = f"n{server.round}"
        server.whole()
    for server.round, server.session in ((1, "old"), (2, "older"), (201, "none")):
        with pytest.raises(SecureSumError, match="is over, or none"):
            server.ask("a", KEYS)


def test_what_was_kept_counts_only_of_rounds_that_were_told_of(tmp_path: Path) -> None:
    server = Server(tmp_path, "abc")
    assert server.nodes["a"].opened(1) == 0
    server.whole()
    assert (server.nodes["a"].opened(1), server.nodes["a"].opened(2), server.nodes["a"].opened(0)) == (1, 0, 0)
