"""The Flower app as a folder, which Flower sends to every node: made from the installed package where no clone is."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import Any

import tomli_w

import feddm_flwr
from feddm_flwr.config import KEYS, ConfigError
from feddm_flwr.reporting.records import nest

_PACKAGE = "feddm_flwr"
_README = """# An app of your own

Written by `feddm new`. `feddm run` in this folder takes the code that is here.

- `feddm_flwr/contrib/` is for codecs, objectives, readers, server optimizers and aggregators of your own. It has an
  example of each. A run names one as `feddm_flwr.contrib.MODULE:NAME`. Flower sends all of it to every node.
- `pyproject.toml` has the defaults of `flwr run .`; `feddm run` and `-c` take the same keys.
"""


def write(folder: Path) -> None:
    """Writes the app of the installed package into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(tomli_w.dumps(_manifest()), encoding="utf-8")
    shutil.copytree(
        Path(feddm_flwr.__file__).parent, folder / _PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )


def new(folder: Path) -> list[str]:
    """Writes an app to extend into a new folder; returns what to say of it.

    Raises:
        ConfigError: there is something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"DIR = {str(folder)!r}: has something in it; name a folder that is empty or new")
    write(folder)
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return [
        f"{folder}: an app of your own",
        f"  extend it in {folder / _PACKAGE / 'contrib'}, which has an example of each kind",
        f"  try it       cd {folder} && feddm run -c 'train.objective=\"{_PACKAGE}.contrib.huber:Huber\"'",
    ]


def _manifest() -> dict[str, Any]:
    about, needs = metadata("feddm-flwr"), requires("feddm-flwr") or []
    names = sorted({re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs}, key=str.lower)
    return {
        "project": {
            "name": "feddm-flwr",
            "version": about["Version"],
            "description": about["Summary"],
            "license": about["License-Expression"],
            "dependencies": [need for need in needs if "extra ==" not in need],
        },
        # They are installed: Flower would fetch them again before each run.
        "tool": {
            "uv": {"exclude-dependencies": names},
            "flwr": {
                "app": {
                    "publisher": "feddm",
                    "fab-include": [f"{_PACKAGE}/**/*.py"],
                    "components": {
                        "serverapp": f"{_PACKAGE}.server_app:app",
                        "clientapp": f"{_PACKAGE}.client_app:app",
                    },
                    "config": nest({name: key.default for name, key in KEYS.items()}),
                }
            },
        },
    }
