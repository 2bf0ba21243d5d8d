"""The built wheel, without a clone: what a user gets who installs it, and extends it in a folder of his own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = 'model.preset="tiny" num-server-rounds=1 train.local-steps=2 sample.steps=2 sample.count=4 out-dir="runs"'


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is that of the wheel; its dependencies are there already."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True, cwd=folder)
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", folder / "there", *folder.glob("*.whl")], check=True, cwd=folder
    )
    own = {key: value for key, value in os.environ.items() if key not in ("FEDDM_APP", "PYTHONPATH")}
    return own | {
        "PYTHONPATH": str(folder / "there"),
        "FLWR_HOME": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
    }


def feddm(env: dict[str, str], cwd: Path, *arguments: str) -> str:
    # Not `python -m`, which would put the working folder first.
    start = "import sys; from feddm_flwr.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_in_an_empty_folder_needs_no_clone(env: dict[str, str], tmp_path: Path) -> None:
    assert f"report  {tmp_path / 'runs'}" in feddm(env, tmp_path, "run", "-c", QUICK)
    assert "completed, round 1 of 1" in feddm(env, tmp_path, "status")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_an_app_of_ones_own_is_extended_and_sent_to_the_nodes(env: dict[str, str], tmp_path: Path) -> None:
    said = feddm(env, tmp_path, "new", "mine")
    assert "extend it in mine/feddm_flwr/contrib" in said
    own = tmp_path / "mine" / "feddm_flwr" / "contrib"
    text = (own / "huber.py").read_text().replace("class Huber", "class Mine")
    (own / "mine.py").write_text(text + f"\n\nprint('a node has', {own.name!r})\n")
    said = feddm(env, tmp_path / "mine", "run", "-v", "-c", f'{QUICK} train.objective="feddm_flwr.contrib.mine:Mine"')
    assert "a node has contrib" in said
    assert "round=1/1" in said
