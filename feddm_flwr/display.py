"""What `feddm run` shows while a run goes on, read from the `feddm:` lines of the run's log."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from feddm_flwr.config import RunConfig


class Display:
    """The live line of a run, from the `feddm:` lines of its log; plain lines where there is no terminal."""

    def __init__(self, config: RunConfig) -> None:
        self.rounds, self.done = config.num_server_rounds, False
        self._up = self._down = 0.0
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
        self._task: TaskID = self._bar.add_task("starting", total=self.rounds, state="", left="")
        self._first = 0.0
        self._state: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def print(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False)

    def take(self, line: str) -> None:
        """Update from a line of the log."""
        _, marked, text = line.partition("feddm: ")
        if not marked:
            return
        said = dict(re.findall(r"(\w+)=(\S+)", text))
        number, _, of = said.get("round", "").partition("/")
        if "asked" in said:
            self._first = self._first or time.monotonic()
            self._state = {"round": number, "done": "0", "asked": said["asked"]}
        elif "done" in said and "node" in said:
            self._state |= {"done": said["done"], "node_loss": said["loss"]}
        elif of and "seconds" in said:
            self._up += float(said["up"])
            self._down += float(said["down"])
            self._state |= {"loss": said["loss"]}
            left = (time.monotonic() - self._first) / int(number) * (self.rounds - int(number))
            self._bar.update(self._task, completed=int(number), left=f"about {_clock(left)} left" if left else "")
            if not self._console.is_terminal:
                self.print(
                    f"round {number}/{of}  loss {said['loss']}  nodes {said['ok']} ok {said['failed']} failed  "
                    f"up {self._up / 1e6:.1f} MB  down {self._down / 1e6:.1f} MB  {said['seconds']} s"
                )
        elif "model" in said and "report" in said:
            self.done = True
        elif "grid" not in said:
            self.print(text.rstrip())
        if self._state:
            s = self._state
            loss = s.get("loss", s.get("node_loss", "–"))
            traffic = f"up {self._up / 1e6:.1f} MB  down {self._down / 1e6:.1f} MB"
            self._bar.update(
                self._task,
                description=f"round {s['round']}/{self.rounds}",
                state=f"nodes {s['done']}/{s['asked']}  loss {loss}  {traffic}",
            )

    def summary(self, overrides: Mapping[str, object], *, local: bool) -> None:
        """Where everything lies."""
        folder = Path(str(overrides.get("out-dir", "runs"))) / str(overrides["run-name"])
        grids = sorted(folder.glob("samples/round-????.png")) if local else []
        self.print(f"\n  model   {folder / 'model'}")
        self.print(f"  grid    {grids[-1] if grids else folder / 'samples'}")
        self.print(f"  report  {folder / 'report.html'}")
        if not local:
            self.print("  (on the SuperLink's machine)")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
