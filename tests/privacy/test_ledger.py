"""The ledger never says less than what left the node: whatever is killed, repeated, resumed or run side by side."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddm_flwr.config import ConfigError
from feddm_flwr.privacy import ledger as module
from feddm_flwr.privacy.accounting import Steps, epsilon
from feddm_flwr.privacy.ledger import BudgetSpentError, Ledger, Limits

ROUND = Steps(0.1, 1.0, 5)
FREE = Limits(math.inf, 1e-5)


def written(path: Path) -> int:
    """How many steps a ledger knows of."""
    return sum(entry.steps.count for entry in Ledger(path).entries())


RENAME = Path.replace


class KilledError(Exception):
    """Stands for a process that ends at this point."""


@settings(max_examples=40)
@given(
    jobs=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["", "before", "writing", "after"])), max_size=8
    )
)
def test_what_left_the_node_is_in_the_ledger_wherever_jobs_are_killed(
    jobs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, left = tmp_path_factory.mktemp("state") / "node.json", {"a": 0, "b": 0}
    for run, killed in jobs:
        ledger = Ledger(path)

        def at(point: str, killed: str = killed) -> None:
            if point == killed:
                raise KilledError

        def replace(self: Path, target: Path) -> Path:
            at("writing")
            RENAME(self, target)
            at("after")
            return target

        with patch.object(Path, "replace", replace):
            try:
                at("before")
                ledger.spend(run, ROUND, FREE, at_least=left[run])
                left[run] += ROUND.count
            except KilledError:
                continue
    entries = Ledger(path).entries()
    for run, count in left.items():
        assert sum(e.steps.count for e in entries if e.run == run) >= count


@pytest.mark.parametrize(("point", "known"), [("mkstemp", 5), ("rename", 5), ("renamed", 10)])
def test_a_process_that_is_killed_leaves_a_ledger_that_is_whole(tmp_path: Path, point: str, known: int) -> None:
    path = tmp_path / "node.json"
    Ledger(path).spend("run", ROUND, FREE)
    code = f"""
import os, signal
from pathlib import Path
from feddm_flwr.privacy.ledger import Ledger, Limits
from feddm_flwr.privacy.accounting import Steps
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
before = Path.replace
def rename(self, target):
    if {point!r} == "rename": kill()
    before(self, target)
    if {point!r} == "renamed": kill()
Path.replace = rename
if {point!r} == "mkstemp": os.fsync = kill
Ledger(Path({str(path)!r})).spend("run", Steps(0.1, 1.0, 5), Limits(float("inf"), 1e-5))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert written(path) == known
    Ledger(path).spend("run", ROUND, FREE)  # and nothing keeps the next from its work
    assert written(path) == known + 5


def test_a_budget_is_never_exceeded_and_a_refusal_costs_nothing(tmp_path: Path) -> None:
    ledger, limit = Ledger(tmp_path / "node.json"), epsilon([Steps(0.1, 1.0, 17)], 1e-6)
    limits = Limits(math.inf, 1e-5, limit, 1e-6)
    spent = [ledger.spend(f"run {i}", ROUND, limits) for i in range(3)]
    assert [one.goes_on for one in spent] == [True, True, False]
    assert spent[0].epsilon == spent[2].epsilon == pytest.approx(epsilon([ROUND], 1e-5))  # each run's own
    assert spent[2].epsilon_total == pytest.approx(epsilon([Steps(0.1, 1.0, 15)], 1e-6))
    before = ledger.path.read_bytes()
    for attempt in (lambda: ledger.spend("run 3", ROUND, limits), lambda: ledger.check("run 3", ROUND, limits)):
        with pytest.raises(BudgetSpentError, match=r"dp-epsilon = .* of this node is spent"):
            attempt()
    with pytest.raises(BudgetSpentError, match=r"privacy\.epsilon = 1 is spent"):
        ledger.spend("run 3", ROUND, Limits(1.0, 1e-5))
    assert ledger.path.read_bytes() == before


def test_jobs_side_by_side_do_not_spend_the_same_rest(tmp_path: Path) -> None:
    limits = Limits(math.inf, 1e-5, epsilon([Steps(0.1, 1.0, 12)], 1e-5), 1e-5)

    def job(number: int) -> bool:
        try:
            Ledger(tmp_path / "node.json").spend(f"run {number}", ROUND, limits)
        except BudgetSpentError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(job, range(6))) == 2
    assert written(tmp_path / "node.json") == 10


def test_a_ledger_that_was_lost_is_noticed_where_the_server_knows_more(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "node.json")
    ledger.spend("run", ROUND, FREE)
    ledger.spend("run", ROUND, FREE, at_least=5)
    ledger.path.unlink()
    with pytest.raises(ConfigError, match="knows of 0 steps of this run, the server of 10: restore it"):
        ledger.spend("run", ROUND, FREE, at_least=10)
    assert not ledger.path.exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"format": 2, "entries": []}', b'{"format": 1, "entries": [{"run": "a"}]}', b"\xff"]
)
def test_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        Ledger(path).spend("run", ROUND, FREE)
    assert path.read_bytes() == content


@pytest.mark.parametrize("wrong", [{"steps": -5}, {"steps": 0}, {"noise": 0.0}, {"sampling": 2.0}, {"noise": math.inf}])
def test_figures_that_nobody_spent_are_damage(tmp_path: Path, wrong: dict[str, float]) -> None:
    path = tmp_path / "node.json"
    Ledger(path).spend("run", ROUND, FREE)
    found = json.loads(path.read_text())
    found["entries"][0] |= wrong
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="cannot be read"):
        Ledger(path).entries()


def test_a_full_disk_takes_nothing_from_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.json"
    Ledger(path).spend("run", ROUND, FREE)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "whole_file", full)
    with pytest.raises(OSError, match="No space"):
        Ledger(path).spend("run", ROUND, FREE)
    assert written(path) == 5
