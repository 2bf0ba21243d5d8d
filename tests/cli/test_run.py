"""`feddm run` before a run starts and after it ended: folders of its own, and what can be gone on with."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from feddm_flwr.cli import launch
from feddm_flwr.cli.main import main
from feddm_flwr.config import flatten, parse
from feddm_flwr.reporting.records import write_status
from feddm_flwr.reporting.run_directory import RunDirectory, reserve


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20261128-120000")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: reserve(tmp_path / "runs", "", "feddm-lean"), range(8)))
    names = sorted(path.name for path in made)
    assert names == [f"feddm-lean-20261128-120000{end}" for end in ("", *(f"-{i}" for i in range(2, 9)))]
    with pytest.raises(FileExistsError):
        reserve(tmp_path / "runs", names[0], "feddm-lean")


@pytest.mark.parametrize(
    ("status", "reason", "checkpoint", "own", "said"),
    [
        ("failed", "the disk is full", True, True, True),
        ("failed", "the disk is full", False, True, False),  # nothing to go on from
        ("failed", "ConfigError: min-nodes = 9 is not allowed", True, True, False),  # fails again
        ("failed", "the disk is full", True, False, False),  # of another run, which is in the way of this one
        ("completed", "", True, True, False),
        ("running", "", True, True, True),  # it was killed
    ],
)
def test_to_go_on_is_said_of_a_run_of_one_s_own_that_can(
    status: str,
    reason: str,
    checkpoint: bool,
    own: bool,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "kept runs" / "x"
    file = run / "checkpoints" / "round-0000.safetensors"

    def ended(*_: object, **__: object) -> int:
        if own:
            run.mkdir(parents=True, exist_ok=True)
            write_status(run, status, reason)
        if checkpoint:
            file.parent.mkdir(exist_ok=True)
            save_file({}, file)
        return 1

    if not own:
        there = RunDirectory(run)
        there.begin(flatten(parse({})), None)
        there.finish(status, reason)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(launch.Simulation, "_wait", lambda self, port: None)
    monkeypatch.setattr(launch, "follow", ended)
    arguments = (
        ["run", "-c", 'run-name="x" out-dir="kept runs"']
        if own
        else ["run", "--resume", str(run), "--num-supernodes", "4"]
    )
    assert main(arguments) == 1
    assert (f"to go on: feddm run --resume '{run}'" in capsys.readouterr().out) == said


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(launch.Simulation, "_wait", lambda self, port: None)
    monkeypatch.setattr(launch, "follow", lambda *_, **__: 1)
    assert main(["run"]) == 1
    assert list(tmp_path.glob("runs/*")) == []


def test_names_that_cannot_be_sent_and_users_without_a_home_are_told_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "none"))
    assert main(["run", "-c", f'out-dir="{tmp_path}/k\udce4n"']) == 2
    assert f"out-dir = '{tmp_path}/k\\udce4n': has bytes that are not UTF-8; rename" in capsys.readouterr().err
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    monkeypatch.chdir(tmp_path)
    assert main(["run"]) == 2
    assert "this user has no home folder; set XDG_STATE_HOME" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
