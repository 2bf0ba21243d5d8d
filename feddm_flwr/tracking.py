"""The run directory: resolved configuration, metrics of every round, TensorBoard events, grids."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from feddm_flwr import trackers
from feddm_flwr.config import ConfigError, local_path
from feddm_flwr.whole_file import forget_unfinished, whole_file

Row = dict[str, Any]

OF_THE_FOLDER = ("run-name", "out-dir")  # keys that say where a run lies, not what it is


class RunInUseError(RuntimeError):
    """Another process writes to the run's folder."""


class RunDirectory:
    """`<out-dir>/<run-name>/`; everything that a run leaves behind is in here."""

    def __init__(self, path: Path, *, resume: bool = False, simulated: bool = True) -> None:
        """Create the folder, or take over that of a run to resume; nothing in it is changed yet. `simulated`: whether
        the nodes are.

        Raises:
            FileExistsError: the folder exists; a run never writes over another.
            FileNotFoundError: there is no run of that name to resume.
            RunInUseError: the run still goes on.
        """
        self.path, self.checkpoints = path, path / "checkpoints"
        self.simulated = simulated
        self._trackers: list[trackers.Tracker] = []
        if not resume:
            path.mkdir(parents=True)
        elif not (path / "config.toml").is_file():
            raise FileNotFoundError(f"{path} is not a run's folder")
        self._lock = FileLock(path / ".lock")  # ends with the process, however that ends
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunInUseError(f"{path} is in use by another process: is the run still going on?") from None
        for folder in (path, self.checkpoints, path / "samples", path / "reference", path / "assets"):
            forget_unfinished(folder)

    def begin(self, config: Mapping[str, object], after: int | None, tracker: str = "none") -> None:
        """Write `config.toml`, which `feddm run -c` and `flwr run -c` take. Of a run that goes on `after` a round,
        forget the figures and grids of later ones, which are made again. The `tracker` gets them beside the folder.

        Raises:
            ConfigError: the tracker cannot be had.
        """
        identity = self.path / ".identity"  # the folder's name may be used again
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._trackers = trackers.make(tracker, self.path, identity.read_text(), without_places(config), after)
        with whole_file(self.path / "config.toml") as file:
            tomli_w.dump(nest(config), file)
        (self.path / "final.json").unlink(missing_ok=True)
        best = self.path / "best.json"
        if best.exists() and json.loads(best.read_text(encoding="utf-8"))["round"] > (after or 0):
            best.unlink()
        (self.path / "samples").mkdir(exist_ok=True)
        resumed = _resumed_after(self.path)
        if after is not None:
            resumed.append(after)
            for path in (self.path / "samples").glob("round-*.png"):
                if (number := re.match(r"round-(\d+)", path.name)) and int(number[1]) > after:
                    path.unlink()
            with whole_file(self.path / "metrics.jsonl") as file:
                for row in read_metrics(self.path):
                    if row["round"] <= after:
                        file.write(_line(row))
        write_status(self.path, "running", resumed_after=resumed, simulated=self.simulated)

    def log_nodes(self, nodes: list[Row]) -> None:
        """Write `nodes.json`: name, images, held_out, class_counts of each node."""
        with whole_file(self.path / "nodes.json") as file:
            file.write(json.dumps(nodes, indent=1).encode())

    def log_round(self, row: Row) -> None:
        """Append a line to `metrics.jsonl`, durably, NaN as null, and give the numbers to the trackers."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        self._track(row, row["round"])

    def add_figures(self, figures: Row) -> None:
        """Add to the last line of `metrics.jsonl` what a round was found to be worth."""
        *before, last = read_metrics(self.path)
        with whole_file(self.path / "metrics.jsonl") as file:
            file.writelines(map(_line, [*before, last | figures]))
        self._track(figures, last["round"])

    def is_judged(self) -> bool:
        """Whether the last line of `metrics.jsonl` has such figures."""
        return any("fid" in row for row in read_metrics(self.path)[-1:])

    def _track(self, row: Row, number: int) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v) and k != "round"}
        for tracker in self._trackers:
            tracker.log(numbers, number)

    def best(self, figure: str) -> float:
        """That figure of the model in best/; infinite where that is by another, or is not there."""
        file = self.path / "best.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return float(found["value"]) if found.get("figure") == figure else math.inf

    def write_best(self, number: int, figure: str, value: float) -> None:
        """Write `best.json`: which round's model is in best/, and why."""
        with whole_file(self.path / "best.json") as file:
            file.write(json.dumps({"round": number, "figure": figure, "value": value}).encode())

    def write_final(self, row: Row) -> None:
        """Write `final.json`: what the nodes said of the averaged weights at the end."""
        with whole_file(self.path / "final.json") as file:
            file.write(json.dumps(row, indent=1).encode())

    def save_grid(self, image: Any, number: int, kind: str = "") -> Path:
        """Write `samples/round-0005.png` (or `round-0005-raw.png`) from a Pillow image."""
        path = self.path / "samples" / f"round-{number:04d}{'-' + kind if kind else ''}.png"
        with whole_file(path) as file:
            image.save(file, "PNG")
        for tracker in self._trackers:
            tracker.image(path, number)
        return path

    def has_grid(self, number: int) -> bool:
        """Whether a round's grid was drawn already."""
        return (self.path / "samples" / f"round-{number:04d}.png").exists()

    def finish(self, status: str, reason: str = "") -> None:
        """Write the status (`completed` or `failed`), tell the trackers and let others resume the run."""
        write_status(self.path, status, reason)
        for tracker in self._trackers:
            tracker.finish(completed=status == "completed")
        self._lock.release()


def write_status(path: Path, status: str, reason: str = "", **more: object) -> None:
    """Write a run's `status.json`: how it stands, why, and what it said or says `more`: the rounds after which it was
    resumed, and whether its nodes are simulated."""
    found = read_status(path) | {"status": status, "reason": reason, **more}
    with whole_file(path / "status.json") as file:
        file.write(json.dumps(found).encode())


def read_status(path: Path) -> dict[str, Any]:
    """What `write_status` wrote of a run; empty where nothing was. One that says it is running, and that no process
    has open, was killed: it is "stopped"."""
    file = path / "status.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if found.get("status") == "running" and not _in_use(path):
        command = "feddm run --resume" if found.get("simulated", True) else "feddm run SUPERLINK --resume"
        found |= {"status": "stopped", "reason": f"the process was killed; {command} goes on with it"}
    return found


def check_kind(path: Path, *, simulated: bool) -> None:
    """Compare a run's nodes with those that are to go on with it.

    Raises:
        ConfigError: only one of the two is a simulation, whose images are others.
    """
    was = read_status(path).get("simulated", simulated)
    if was != simulated:
        before, way = ("a simulation", "local") if was else ("one of real nodes", "SUPERLINK")
        raise ConfigError(f"{path} was {before}, and cannot go on otherwise: feddm run {way} --resume {path}")


def _in_use(path: Path) -> bool:
    """Whether a process writes to the run's folder, so far as can be told."""
    try:
        with FileLock(path / ".lock", timeout=0):
            return False
    except (Timeout, OSError):  # or a folder that cannot be written
        return True


def status_of(path: Path) -> str:
    """How a run stands; "" where there is none."""
    return str(read_status(path).get("status", ""))


def _resumed_after(path: Path) -> list[int]:
    rounds: list[int] = read_status(path).get("resumed_after", [])
    return rounds


def without_places(config: Mapping[str, object]) -> dict[str, object]:
    """A flat configuration as others may see it: where the images and the run lie is nobody else's business."""
    shown = {key: value for key, value in config.items() if key not in OF_THE_FOLDER}
    if path := local_path(str(shown.get("data.name", ""))):
        shown["data.name"] = path.name
    return shown


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


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in tables.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return keys


def grid_files(path: Path) -> dict[int, Path]:
    """A run's grids of averaged weights, by round, in order."""
    found = (path / "samples").glob("round-*.png")
    return dict(sorted((int(p.stem[6:]), p) for p in found if p.stem[6:].isdigit()))


def read_metrics(path: Path) -> list[Row]:
    """The lines of a run's `metrics.jsonl`, none where there is no such file yet, without one that a killed run
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


def total_bytes(rows: list[Row]) -> dict[str, int]:
    """Each kind of traffic (`bytes_up`, …), summed over a run's rounds."""
    return {key: sum(row.get(key, 0) for row in rows) for key in rows[-1] if key.startswith("bytes_")}


def simulated_nodes(rows: list[Row]) -> int:
    """How many nodes the simulation had whose rounds these are; 0 where none was done."""
    return max((int(row.get("connected") or row["clients_ok"]) for row in rows), default=0)


def _line(row: Row) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite).encode() + b"\n"
