"""What every test starts with."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)  # how long an example takes says nothing there
settings.load_profile("shared-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--codec feddm_flwr.contrib.MODULE:NAME`: hold an extension's codec against the laws of the built-in ones."""
    parser.addoption("--codec", action="append", default=["feddm_flwr.contrib.fp8:Float8"], metavar="NAME")


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes keep their state in the test's own folder, never in the user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg-state"))
