"""The run directory: resolved configuration, metrics of every round, TensorBoard events, grids."""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from feddm_flwr.reporting import prometheus, trackers
from feddm_flwr.reporting.records import (
    Row,
    as_line,
    epsilon_spent,
    nest,
    read_config,
    read_metrics,
    read_rounds,
    resumed_after,
    without_places,
    write_status,
)
from feddm_flwr.storage.atomic import forget_unfinished, whole_file


def usual_name(strategy: str) -> str:
    """Returns the name of a run that was given none; one that begins in the same second has the same."""
    return f"{strategy}-{time.strftime('%Y%m%d-%H%M%S')}"


def reserve(out_dir: Path, name: str, strategy: str) -> Path:
    """Makes the folder of a new run and returns it: `name`, or where that is empty one that no other run has, though it
    begins in the same second.

    Raises:
        FileExistsError: there is a folder of that name.
    """
    stem = name or usual_name(strategy)
    path, others = out_dir / stem, count(2)
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if name or not path.exists():  # out_dir is a file
                raise
            path = out_dir / f"{stem}-{next(others)}"
        else:
            return path


class RunInUseError(RuntimeError):
    """Another process writes to the run's folder."""


class RunDirectory:
    """`<out-dir>/<run-name>/`; everything that a run leaves behind is in here."""

    def __init__(self, path: Path, *, resume: bool = False, simulated: bool = True) -> None:
        """Create the folder, or take over that of a run to resume; nothing in it is changed yet. `simulated`: whether
        the nodes are.

        Raises:
            FileExistsError: the folder has something in it; a run never writes over another.
            FileNotFoundError: there is no run of that name to resume.
            RunInUseError: the run still goes on.
            OSError: the folder cannot be written, or its files not be locked.
        """
        self.path, self.checkpoints = path, path / "checkpoints"
        self.simulated = simulated
        self._trackers: list[trackers.Tracker] = []
        if not resume:
            path.mkdir(parents=True, exist_ok=True)  # reserved, perhaps
            if any(path.iterdir()):
                raise FileExistsError(f"{path} exists; choose another run-name")
        elif not (path / "config.toml").is_file():
            raise FileNotFoundError(f"{path} is not a run's folder")
        self._lock = FileLock(path / ".lock")  # ends with the process, however that ends
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunInUseError(f"{path} is in use by another process: is the run still going on?") from None
        except OSError as error:  # of some network file systems
            text = f"{error.strerror}: files there cannot be locked; set out-dir to a folder on another file system"
            raise OSError(error.errno, text, str(path)) from error
        for folder in (path, self.checkpoints, path / "samples", path / "reference", path / "assets"):
            forget_unfinished(folder)

    def begin(self, config: Mapping[str, object], after: int | None, tracker: str = "none") -> None:
        """Writes `config.toml`, which `feddm run -c` and `flwr run -c` take. Of a run that goes on `after` a round,
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
        resumed = resumed_after(self.path)
        if after is not None:
            resumed.append(after)
            for path in (self.path / "samples").glob("round-*.png"):
                if (number := re.match(r"round-(\d+)", path.name)) and int(number[1]) > after:
                    path.unlink()
            with whole_file(self.path / "metrics.jsonl") as file:
                for row in read_metrics(self.path):
                    if row["round"] <= after:
                        file.write(as_line(row))
        write_status(self.path, "running", resumed_after=resumed, simulated=self.simulated)

    def log_nodes(self, nodes: list[Row]) -> None:
        """Writes `nodes.json`: name, images, held_out, class_counts of each node."""
        with whole_file(self.path / "nodes.json") as file:
            file.write(json.dumps(nodes, indent=1).encode())

    def log_round(self, row: Row) -> None:
        """Appends a line to `metrics.jsonl`, durably, NaN as null, and gives the numbers to the trackers."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(as_line(row))
            file.flush()
            os.fsync(file.fileno())
        self._track(row, row["round"])
        self._watched(running=True)

    def add_figures(self, figures: Row) -> None:
        """Adds to the last line of `metrics.jsonl` what a round was found to be worth."""
        *before, last = read_metrics(self.path)
        with whole_file(self.path / "metrics.jsonl") as file:
            file.writelines(map(as_line, [*before, last | figures]))
        self._track(figures, last["round"])
        self._watched(running=True)

    def _watched(self, *, running: bool) -> None:
        asked = read_config(self.path)["num-server-rounds"]
        prometheus.write(self.path, read_rounds(self.path), asked, running=running)

    def is_evaluated(self) -> bool:
        """Tells whether the last line of `metrics.jsonl` has such figures."""
        return any("fid" in row for row in read_metrics(self.path)[-1:])

    def chosen_average(self) -> tuple[float, str] | None:
        """Returns the width of the average that was chosen after the last round, and by what; None where none was."""
        last = read_metrics(self.path)[-1:]
        return (last[0]["average_width"], last[0]["average_by"]) if last and "average_by" in last[0] else None

    def epsilon(self) -> float | None:
        """Returns the most that a node has spent of its images' privacy; None where that does not count."""
        return epsilon_spent(read_rounds(self.path))

    def _track(self, row: Row, number: int) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v) and k != "round"}
        for tracker in self._trackers:
            tracker.log(numbers, number)

    def best(self, figure: str) -> float:
        """Returns that figure of the model in best/; infinite where that is by another, or is not there."""
        file = self.path / "best.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return float(found["value"]) if found.get("figure") == figure else math.inf

    def write_best(self, number: int, figure: str, value: float) -> None:
        """Writes `best.json`: which round's model is in best/, and why."""
        with whole_file(self.path / "best.json") as file:
            file.write(json.dumps({"round": number, "figure": figure, "value": value}).encode())

    def write_final(self, row: Row) -> None:
        """Writes `final.json`: what the nodes said of the averaged weights at the end."""
        with whole_file(self.path / "final.json") as file:
            file.write(json.dumps(row, indent=1).encode())

    def save_grid(self, image: Any, number: int, kind: str = "") -> Path:
        """Writes `samples/round-0005.png` (or `round-0005-raw.png`) from a Pillow image."""
        path = self.path / "samples" / f"round-{number:04d}{'-' + kind if kind else ''}.png"
        with whole_file(path) as file:
            image.save(file, "PNG")
        for tracker in self._trackers:
            tracker.image(path, number)
        return path

    def has_grid(self, number: int) -> bool:
        """Tells whether a round's grid was drawn already."""
        return (self.path / "samples" / f"round-{number:04d}.png").exists()

    def finish(self, status: str, reason: str = "") -> None:
        """Writes the status (`completed` or `failed`), tell the trackers and let others resume the run."""
        write_status(self.path, status, reason)
        with suppress(OSError, ValueError):  # a run that failed before it began, or whose disk is full
            self._watched(running=False)
        for tracker in self._trackers:
            tracker.finish(completed=status == "completed")
        self._lock.release()
