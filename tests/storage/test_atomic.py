"""What is written appears whole and stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from feddm_flwr.exchange.node_state import NodeState
from feddm_flwr.reporting.run_directory import RunDirectory
from feddm_flwr.storage.atomic import whole_folder


def test_everything_in_a_folder_is_durable_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (durable.append(os.fstat(handle).st_ino), sync(handle)))
    with whole_folder(tmp_path / "model") as folder:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_text("w")
        (folder / "card").write_text("c")
    written = [tmp_path / "model", *(tmp_path / "model").rglob("*")]
    assert {path.stat().st_ino for path in written} <= {*durable}
    assert durable[-1] == tmp_path.stat().st_ino  # then that it is there


def test_an_earlier_folder_stays_where_the_new_one_fails(tmp_path: Path) -> None:
    def write(text: str, fails: bool = False) -> None:
        with whole_folder(tmp_path / "model") as folder:
            folder.mkdir()
            (folder / "card").write_text(text)
            if fails:
                raise OSError("full")

    write("first")
    with pytest.raises(OSError, match="full"):
        write("second", fails=True)
    assert (tmp_path / "model" / "card").read_text() == "first"
    write("third")
    assert (tmp_path / "model" / "card").read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_began_to_write_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin({}, None)
    run.checkpoints.mkdir()
    (run.checkpoints / ".writing-abc").write_text("half a checkpoint")
    run._lock.release()
    RunDirectory(tmp_path / "run", resume=True)
    assert [*run.checkpoints.iterdir()] == []

    own = NodeState(tmp_path, "0" * 32, "north").path
    for name, days in (("old", 2), ("new", 0)):  # that of a day may be of a process that is at it
        for folder in (own, own.parent):
            (folder / f".writing-{name}").write_text("half a residual")
            os.utime(folder / f".writing-{name}", (time.time() - days * 86400,) * 2)
    NodeState(tmp_path, "0" * 32, "north")
    assert sorted(path.name for path in own.parent.rglob(".writing-*")) == [".writing-new"] * 2
