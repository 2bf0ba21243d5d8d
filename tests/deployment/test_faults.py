"""Real SuperLink and SuperNodes on loopback, with TLS and authentication, killed, cut off and lied to."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from federation import ROOT, Federation, wait
from hostile import SLOW
from proxy import Proxy

#: Error feedback, a shadow and server momentum; every round needs every node.
JOB: dict[str, Any] = {"strategy": "feddm-lean", "num_server_rounds": 3, "min_nodes": 3, "min_replies": 3}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one = Federation(tmp_path_factory.mktemp("federation"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> str:
    """The checksum of the model that the job comes to when nothing happens."""
    code, said = federation.run(run_name="undisturbed", **JOB)
    assert code == 0, said
    return federation.checksum("undisturbed")


def resumed_after(federation: Federation, name: str) -> list[int]:
    after: list[int] = federation.status(name)["resumed_after"]
    return after


def test_whatever_is_killed_the_resumed_run_has_the_same_bits(federation: Federation, undisturbed: str) -> None:
    def residuals() -> set[Path]:  # those of the undisturbed run are there already
        return {*(federation.folder / "north-state").glob("*/north/residual-2.frame")}

    before, kept = federation.log("south"), residuals()
    run = federation.start_run(run_name="killed", **JOB)
    # A node, while it trains; its service manager starts it again. The round is repeated.
    federation.wait_for_task("south", before)
    assert (workers := federation.workers("south"))
    federation.crash("south")
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    federation.wait_for_round("killed", 1)
    # The ServerApp, in the middle of the next round.
    wait(lambda: len(residuals() - kept), "round 2 on north")
    federation.server_app().kill()
    said, _ = run.communicate(timeout=500)
    assert run.returncode == 1, said
    assert f"to go on: feddm run site --resume {federation.out / 'killed'}" in said
    run = federation.start_run("--resume", federation.out / "killed")
    federation.wait_for_round("killed", 2)
    # The SuperLink, and with it the log of the run; nodes find it again by themselves.
    federation.processes["superlink"].kill()
    said, _ = run.communicate(timeout=500)
    assert run.returncode == 1, said
    federation.start_superlink()
    code, said = federation.run("--resume", federation.out / "killed")
    assert code == 0, said
    assert "resumed after round" in said
    assert [row["round"] for row in federation.rows("killed")] == [1, 2, 3]
    assert resumed_after(federation, "killed")[0] == 1
    assert federation.checksum("killed") == undisturbed


def test_a_network_that_fails_costs_time_and_nothing_else(federation: Federation, undisturbed: str) -> None:
    federation.stop("south")
    proxy = Proxy(federation.port)
    try:
        federation.start_node("south", port=proxy.port)
        proxy.mode = "delay"
        run = federation.start_run(run_name="network", **JOB)
        federation.wait_for_round("network", 1)
        told = federation.command("feddm", "status", "site")
        assert re.search(r"nodes: .*\d online", told)
        assert re.search(r"run \d+: running, [\d mins]+\n  round \d+ of \d+, loss [\d.]+, \d replies, ", told)
        proxy.mode = "freeze"
        time.sleep(20)
        proxy.mode = "pass"
        federation.wait_for_round("network", 2)
        proxy.cut()
        time.sleep(20)
        proxy.begin()
        said, _ = run.communicate(timeout=500)
        assert run.returncode == 0, said
    finally:
        federation.stop("south")
        proxy.cut()
        federation.start_node("south")
    assert federation.checksum("network") == undisturbed


def test_nodes_that_lie_or_dawdle_are_dropped_and_named(federation: Federation, tmp_path: Path) -> None:
    app = tmp_path / "hostile"
    app.mkdir()
    shutil.copy(Path(__file__).parent / "hostile.py", app)
    described = (ROOT / "pyproject.toml").read_text().replace("feddm_flwr.client_app:app", "hostile:app")
    (app / "pyproject.toml").write_text(described.replace('"feddm_flwr/**/*.py"', '"hostile.py"'))
    code, said = federation.run(
        app=app, run_name="lied-to", num_server_rounds=4, min_nodes=3, min_replies=2, round_timeout=SLOW - 20
    )
    assert code == 0, said
    failures = [row["failures"] for row in federation.rows("lied-to")]
    reasons = ["bad-frame", "outlier", "oversized", "timeout"]
    assert failures == [{reason: 1} for reason in reasons]
    for text in (
        "node=east dropped: bad-frame: chunk 0 is truncated or its checksum is wrong",
        "node=east dropped: outlier: norm",
        "node=east dropped: oversized: Reply message objects are unavailable",
        "node=east dropped: timeout:",
    ):
        assert text in said
    assert all(row["clients_ok"] == 2 for row in federation.rows("lied-to"))


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_and_room_lets_it_go_on_without_a_worker(
    federation: Federation, undisturbed: str
) -> None:
    """To the same bits."""
    federation.stop("south")
    federation.start_node("south", own="worker=false")
    run = federation.start_run(run_name="full", **JOB)
    federation.wait_for_round("full", 1)
    server = federation.server_app()
    server.rlimit(psutil.RLIMIT_FSIZE, (500_000, 500_000))  # a checkpoint has over two megabytes
    said, _ = run.communicate(timeout=500)
    assert run.returncode == 1, said
    assert re.search(r"the checkpoint of round [123] cannot be written \(File too large\); make room in ", said)
    assert federation.status("full")["status"] == "failed"
    code, said = federation.run("--resume", federation.out / "full")
    assert code == 0, said
    assert federation.checksum("full") == undisturbed
    assert federation.workers("south") == []
    assert federation.workers("north")


def test_strangers_are_refused(federation: Federation, tmp_path: Path) -> None:
    federation.command("feddm", "certs", tmp_path / "keys", "--host", "127.0.0.1")
    federation.command("feddm", "certs", federation.keys, "--node", "stranger")
    federation.make_images("stranger", 9)
    federation.start_node("stranger")
    wait(lambda: "Exit Code: 305" in federation.log("stranger"), "a refusal", 60)
    federation.kill("stranger")
    federation.start_node("stranger", key="north", ca=tmp_path / "keys" / "ca.crt")
    wait(lambda: re.search(r"(?i)certificate.verify.failed", federation.log("stranger")), "a refusal", 60)
    federation.kill("stranger")
    federation.stop("south")
    federation.start_node("stranger", key="south")
    code, said = federation.run(run_name="impostor", **JOB)
    assert code == 1
    assert "stranger: the node is registered as 'south'; node-name must be" in said
    assert (federation.keys / "ca.key").stat().st_mode & 0o777 == 0o600
