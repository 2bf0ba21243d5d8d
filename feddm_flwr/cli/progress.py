"""What `feddm run` shows while a run goes on, read from the `feddm:` lines of the run's log."""

from __future__ import annotations

import math
import re
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from feddm_flwr.config import RunConfig
from feddm_flwr.reporting.progress import MARK, NodeDone, RoundBegun, RoundDone, Sampling, parse
from feddm_flwr.reporting.records import grid_files


class Display:
    """The live line of a run, from the `feddm:` lines of its log; plain lines where there is no terminal."""

    def __init__(self, config: RunConfig) -> None:
        self._rounds = config.num_server_rounds
        self._round = self._asked = self._done = self._up = self._down = 0
        self._loss = ""
        self._first = 0.0
        self._finished_here = 0  # rounds, without those before the run was resumed
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=self._rounds, state="", left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a terminal that was closed
            self._bar.stop()

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False)

    def take(self, line: str) -> None:
        """Updates from a line of the log; a node's text in it cannot pass for one of the server's."""
        _, marked, text = line.rstrip().partition(MARK)
        if not marked:
            return
        said = parse(text)
        if isinstance(said, RoundBegun):
            self._first = self._first or time.monotonic()
            self._round, self._asked, self._done = said.round, said.asked, 0
        elif isinstance(said, NodeDone):
            self._done = said.done
            if not self._loss and math.isfinite(said.loss):  # of a secure sum only the round's is known
                self._loss = f"{said.loss:.4f}"
        elif isinstance(said, RoundDone):
            self._loss = f"{said.loss:.4f}"
            self._up += said.up
            self._down += said.down
            self._finished(said)
        elif isinstance(said, Sampling):
            self._bar.update(self._task, state=f"drawing {said.count} samples")
            return
        elif not re.match(r"round=\d+ grid=|model=|report=", text):
            self.print(text)
        if self._asked:
            self._bar.update(
                self._task,
                description=f"round {self._round}/{self._rounds}",
                state=f"nodes {self._done}/{self._asked}  loss {self._loss or '–'}  {self._traffic()}",
            )

    def _finished(self, said: RoundDone) -> None:
        self._finished_here += 1
        left = (time.monotonic() - self._first) / self._finished_here * (self._rounds - said.round)
        self._bar.update(self._task, completed=said.round, left=f"about {_clock(left)} left" if left else "")
        if not self._console.is_terminal:
            nodes = f"nodes {said.ok} ok {said.failed} failed"
            head = f"round {said.round}/{self._rounds}  loss {self._loss}  {nodes}"
            self.print(f"{head}  {self._traffic()}  {said.seconds:.1f} s")

    def _traffic(self) -> str:
        return f"up {self._up / 1e6:.1f} MB  down {self._down / 1e6:.1f} MB"

    def summary(self, folder: Path, *, local: bool) -> None:
        """Prints where everything of the run in that folder lies."""
        drawn = [*grid_files(folder).values()] if local else []
        self.print("")
        places = {"model": folder / "model", "grid": drawn[-1] if drawn else folder / "samples"}
        for what, path in {**places, "report": folder / "report.html"}.items():
            if not local or (path.exists() and path != folder / "samples"):
                self.print(f"  {what:7s} {path}")
        if not local:
            self.print("  (on the SuperLink's machine)")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
