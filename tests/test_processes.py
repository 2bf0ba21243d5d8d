"""What each process of a run is made of: every node gets every module, and what must start soon imports little."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parent.parent


def test_flower_sends_every_module_to_the_nodes() -> None:
    """Flower leaves out what .gitignore names, and folders of names of its own: a room called `runs` would be missing
    on every node."""
    tracked = subprocess.run(["git", "ls-files", "feddm_flwr"], cwd=ROOT, capture_output=True, text=True, check=False)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "feddm_flwr").rglob("*.py")}
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        assert {name for name in bundle.namelist() if name.endswith(".py")} == modules
    assert not tracked.stdout or modules >= {*tracked.stdout.split()}


@pytest.mark.parametrize("module", ["client_app", "node.settings", "node.worker", "server_app", "cli.main"])
def test_what_must_start_soon_imports_neither_torch_nor_diffusers(module: str) -> None:
    code = (
        f"import sys, feddm_flwr.{module}; print([m for m in ('torch', 'diffusers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
