"""The run directory: resolved configuration, metrics of every round, TensorBoard events, grids."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from tensorboardX import SummaryWriter

Row = dict[str, Any]


class RunDirectory:
    """`<out-dir>/<run-name>/`; everything that a run leaves behind is in here."""

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        """Create the folder and write `config.toml`, which `feddm run -c` and `flwr run -c` take.

        Raises:
            FileExistsError: the folder exists; a run never writes over another.
        """
        path.mkdir(parents=True)
        self.path = path
        (path / "samples").mkdir()
        (path / "config.toml").write_text(tomli_w.dumps(nest(config)), encoding="utf-8")
        self._board = SummaryWriter(str(path / "tensorboard"))

    def log_nodes(self, nodes: list[Row]) -> None:
        """Write `nodes.json`: name, images, held_out, class_counts of each node."""
        (self.path / "nodes.json").write_text(json.dumps(nodes, indent=1), encoding="utf-8")

    def log_round(self, row: Row) -> None:
        """Append a line to `metrics.jsonl`, NaN as null, and the numbers to TensorBoard."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        for key, value in clean.items():
            if isinstance(value, int | float) and key != "round":
                self._board.add_scalar(key, value, row["round"])
        self._board.flush()

    def save_grid(self, image: Any, number: int, kind: str = "") -> Path:
        """Write `samples/round-0005.png` (or `round-0005-raw.png`) from a Pillow image."""
        path = self.path / "samples" / f"round-{number:04d}{'-' + kind if kind else ''}.png"
        image.save(path)
        return path

    def replace_folder(self, name: str, written: Path) -> Path:
        """Put a finished folder in place under its name, so that a half-written one is never seen."""
        target = self.path / name
        if target.exists():
            shutil.rmtree(target)
        return written.rename(target)

    def finish(self, status: str, reason: str = "") -> None:
        """Write the status (`completed` or `failed`) and close the event file."""
        write_status(self.path, status, reason)
        self._board.close()


def write_status(path: Path, status: str, reason: str = "") -> None:
    """Write a run's `status.json`."""
    (path / "status.json").write_text(json.dumps({"status": status, "reason": reason}), encoding="utf-8")


def nest(flat: Mapping[str, object]) -> dict[str, Any]:
    """Dotted keys as nested tables."""
    tables: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[leaf] = value
    return tables


def read_metrics(path: Path) -> list[Row]:
    """The lines of a run's `metrics.jsonl`, none where there is no such file yet."""
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
