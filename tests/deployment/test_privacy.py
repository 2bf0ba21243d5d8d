"""A real node with a budget: it holds against every run, through kills and restarts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from federation import Federation

from feddm_flwr.privacy.accounting import Steps, epsilon
from feddm_flwr.privacy.ledger import Ledger

IMAGES, ROUNDS = 18, 2
ROUND = Steps(8 / IMAGES, 1.0, 3)  # of QUICK
LIMIT = epsilon([Steps(ROUND.sampling, ROUND.noise, ROUND.count * ROUNDS)], 1e-5) * 1.01
PRIVATE = {"privacy__mechanism": "dp-sgd", "privacy__noise_multiplier": 1.0, "min_nodes": 1, "strategy": "feddm-lean"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    budget = f"dp-epsilon={LIMIT} dp-delta=1e-5"
    one = Federation(
        tmp_path_factory.mktemp("federation"), ("north", "south"), lambda _, site: budget if site == "north" else ""
    )
    yield one
    one.close()


def spent(federation: Federation) -> int:
    """Steps that north's ledger knows of."""
    ledger = Ledger(federation.folder / "north-state" / "privacy" / "north.json")
    return sum(entry.steps.count for entry in ledger.entries())


def test_a_run_without_privacy_is_refused_and_costs_nothing(federation: Federation) -> None:
    code, said = federation.run(run_name="plain", num_server_rounds=1)
    assert code != 0
    assert "this node has a budget" in said
    assert spent(federation) == 0
    assert not (federation.out / "plain").exists()


def test_what_is_killed_and_asked_again_is_paid_for_and_the_budget_holds(federation: Federation) -> None:
    name, before = "private", federation.log("north")
    run = federation.start_run(run_name=name, num_server_rounds=3, **PRIVATE)
    federation.wait_for_task("north", before)
    federation.crash("north")  # in the first round, wherever it is
    said, _ = run.communicate(timeout=500)
    assert run.returncode == 0, said
    rows = federation.rows(name)
    taken = sum("epsilon" in row["nodes"].get("north", {}) for row in rows)
    assert 1 <= taken <= ROUNDS
    assert len(rows) == 3  # south goes on
    assert ROUND.count * taken <= spent(federation) <= ROUND.count * ROUNDS
    assert (
        max(row["nodes"]["north"]["epsilon_total"] for row in rows if "epsilon" in row["nodes"].get("north", {}))
        <= LIMIT
    )
    code, said = federation.run(run_name="again", num_server_rounds=1, **(PRIVATE | {"min_nodes": 2}))
    assert code != 0
    assert "of this node is spent" in said
