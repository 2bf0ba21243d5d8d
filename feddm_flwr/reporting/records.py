"""Reading and writing the files of a run's folder: metrics, status, configuration."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from feddm_flwr.config import ConfigError, local_path
from feddm_flwr.storage.atomic import whole_file

Row = dict[str, Any]


OF_THE_FOLDER = ("run-name", "out-dir")  # keys that say where a run lies, not what it is


def write_status(path: Path, status: str, reason: str = "", **more: object) -> None:
    """Writes a run's `status.json`: how it stands, why, and what it said or says `more`: the rounds after which it was
    resumed, and whether its nodes are simulated."""
    found = read_status(path) | {"status": status, "reason": reason, **more}
    with whole_file(path / "status.json") as file:
        file.write(json.dumps(found).encode())


def read_status(path: Path) -> dict[str, Any]:
    """Returns what `write_status` wrote of a run; empty where nothing was. One that says it is running, and that no
    process has open, was killed: it is "stopped"."""
    file = path / "status.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if found.get("status") == "running" and not _in_use(path):
        command = "feddm run --resume" if found.get("simulated", True) else "feddm run SUPERLINK --resume"
        found |= {"status": "stopped", "reason": f"the process was killed; {command} goes on with it"}
    return found


def check_kind(path: Path, *, simulated: bool) -> None:
    """Compares a run's nodes with those that are to go on with it.

    Raises:
        ConfigError: only one of the two is a simulation, whose images are others.
    """
    was = read_status(path).get("simulated", simulated)
    if was != simulated:
        before, way = ("a simulation", "local") if was else ("one of real nodes", "SUPERLINK")
        raise ConfigError(f"{path} was {before}, and cannot go on otherwise: feddm run {way} --resume {path}")


def _in_use(path: Path) -> bool:
    """Tells whether a process writes to the run's folder, so far as can be told."""
    try:
        with FileLock(path / ".lock", timeout=0):
            return False
    except (Timeout, OSError):  # or a folder that cannot be written
        return True


def status_of(path: Path) -> str:
    """Returns how a run stands; "" where there is none."""
    return str(read_status(path).get("status", ""))


def resumed_after(path: Path) -> list[int]:
    rounds: list[int] = read_status(path).get("resumed_after", [])
    return rounds


def without_places(config: Mapping[str, object]) -> dict[str, object]:
    """Returns a flat configuration as others may see it: where the images and the run lie is nobody else's business."""
    shown = {key: value for key, value in config.items() if key not in OF_THE_FOLDER}
    if path := local_path(str(shown.get("data.name", ""))):
        shown["data.name"] = path.name
    return shown


def nest(flat: Mapping[str, object]) -> dict[str, Any]:
    """Returns dotted keys as nested tables."""
    tables: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[leaf] = value
    return tables


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in tables.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return keys


def grid_files(path: Path) -> dict[int, Path]:
    """Returns a run's grids of averaged weights, by round, in order."""
    found = (path / "samples").glob("round-*.png")
    return dict(sorted((int(p.stem[6:]), p) for p in found if p.stem[6:].isdigit()))


def read_metrics(path: Path) -> list[Row]:
    """Returns the lines of a run's `metrics.jsonl`, none where there is no such file yet, without one that a killed run
    was writing.

    Raises:
        ValueError: another line is damaged.
    """
    file = path / "metrics.jsonl"
    rows: list[Row] = []
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if line.endswith(b"\n"):
                raise ValueError(f"{file}, line {number}, is damaged: {error}; mend or remove it") from error
    return rows


@dataclass(frozen=True)
class RoundRecord:
    """A line of `metrics.jsonl`. What was not measured, or an older version did not write, is None, empty or 0."""

    round: int
    train_loss: float = math.nan
    eval_loss: float | None = None  # of the weights that the round started from
    eval_levels: list[float] = field(default_factory=list)  # the same by noise level
    eval_spread: float | None = None
    connected: int = 0
    clients_ok: int = 0
    clients_failed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_full: int = 0
    bytes_up_fp32: int = 0
    bytes_down_fp32: int = 0
    bytes_data_parallel: int = 0
    bytes_other: int = 0
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    state_lost: int = 0
    coding_error: float | None = None
    local_steps: int = 0
    update_norm: float | None = None
    drift: float | None = None
    contraction: float | None = None
    seconds: float = 0.0
    epsilon: float | None = None  # what this run has spent of the privacy of each image, or of each node
    psnr: float | None = None
    fid: float | None = None
    kid: float | None = None
    coverage: float | None = None
    coverage_by_class: dict[str, float] = field(default_factory=dict)
    lipschitz: float | None = None
    average_width: float | None = None  # of the average that the figures are of, where it was chosen
    average_by: str = ""  # the figure that it was chosen by
    average_tried: dict[str, float] = field(default_factory=dict)  # what was chosen among, and by

    def figure(self, name: str) -> float | None:
        """Returns a figure by its name in the file."""
        value: float | None = getattr(self, name)
        return value

    @classmethod
    def from_row(cls, row: Row) -> RoundRecord:
        """Reads a line; what a newer version wrote beside is passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known})


#: Kinds of traffic.
TRAFFIC = tuple(f.name for f in fields(RoundRecord) if f.name.startswith("bytes_"))


def read_rounds(path: Path) -> list[RoundRecord]:
    """Returns a run's rounds.

    Raises:
        ValueError: as `read_metrics`.
    """
    return [RoundRecord.from_row(row) for row in read_metrics(path)]


def total_bytes(rounds: Sequence[RoundRecord]) -> dict[str, int]:
    """Returns each kind of traffic (`bytes_up`, …), summed over a run's rounds."""
    return {key: sum(getattr(r, key) for r in rounds) for key in TRAFFIC}


def epsilon_spent(rounds: Sequence[RoundRecord]) -> float | None:
    """Returns the most that a run has spent of privacy, though who spent it was left out later; None where that does
    not count."""
    return max((r.epsilon for r in rounds if r.epsilon is not None), default=None)


def simulated_nodes(rounds: Sequence[RoundRecord]) -> int:
    """Returns how many nodes the simulation had whose rounds these are; 0 where none was done."""
    return max((r.connected or r.clients_ok for r in rounds), default=0)


def as_line(row: Row) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite).encode() + b"\n"


def read_config(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    try:
        return flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
