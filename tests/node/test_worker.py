"""What a node's warm process tells the server; tests/deployment has the process itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from feddm_flwr.config import ConfigError
from feddm_flwr.node import worker


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/home/doe/state/x"), "PermissionError: Permission denied"),
        (RuntimeError("cannot open /data/doe.png"), "RuntimeError; the node's own log says more"),
        (KeyError(), "KeyError; the node's own log says more"),
        (FloatingPointError("the training loss of north became nan"), "FloatingPointError: the training loss of north"),
        (ConfigError("data-path = '/data': no images"), "ConfigError: data-path = '/data': no images"),
    ],
)
def test_an_error_names_no_file(error: Exception, said: str) -> None:
    assert worker.told(error).startswith(said)
    assert "doe" not in worker.told(error)


@pytest.mark.parametrize("place", ["worker.py", "codecs/grid.py", "a/folder/of/ours.py"])
def test_a_process_that_has_older_code_is_not_used(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PACKAGE", tmp_path)
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x = 1\n")
    (tmp_path / "newest.py").touch()
    before = worker._code()
    assert worker._code() == before
    os.utime(file, (1, 1))  # as Flower unpacks it, which may be an older file than others
    assert worker._code() != before
    file.unlink()
    assert worker._code() != before
