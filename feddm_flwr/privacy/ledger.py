"""What a node has spent of its images' privacy, in a file that belongs to the images and outlives every run.

    <state-path>/privacy/<node>.json    of a node with images of its own, or a budget: whatever it trains on
    <state-path>/privacy/<node>-<fingerprint>.json    of the part of a data set that a simulated node has

Steps are written down, durably, before the first of them is taken. So the ledger may say more than what left the
node, where a process was killed, and never less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from feddm_flwr.config import ConfigError
from feddm_flwr.privacy.accounting import Steps, epsilon
from feddm_flwr.storage.atomic import sync, whole_file

_FORMAT = 1


class BudgetSpentError(ConfigError):
    """The steps would cost more than is left; nothing was written."""


@dataclass(frozen=True)
class Limits:
    """The most that may be spent; infinite where there is no limit."""

    run: float  # epsilon of one run
    run_delta: float
    node: float = math.inf  # epsilon of all runs
    node_delta: float = 1e-5


@dataclass(frozen=True)
class Spent:
    """What steps came to, with everything before them."""

    epsilon: float  # of this run
    epsilon_total: float  # of all runs
    goes_on: bool  # whether as many steps more are within the limits


@dataclass(frozen=True)
class Entry:
    """Steps of a kind in a run."""

    run: str
    steps: Steps
    first: str  # when, UTC
    last: str


class Ledger:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """Returns what was spent, by run and kind of steps.

        Raises:
            ConfigError: the file is damaged, or of a later version.
        """
        try:
            found = json.loads(self.path.read_bytes())
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']!r}")
            return [
                Entry(e["run"], _steps(e["sampling"], e["noise"], e["steps"]), e["first"], e["last"])
                for e in found["entries"]
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the node's privacy ledger {self.path.name} cannot be read ({type(error).__name__}: {error}); restore "
                "it from a copy: without it nobody knows what was spent"
            ) from error

    def spend(self, run: str, steps: Steps, limits: Limits, at_least: int = 0) -> Spent:
        """Writes down steps that are about to be taken in a run, in which the server knows of `at_least` so many.

        Raises:
            BudgetSpentError: they would cost more than the limits allow.
            ConfigError: as `entries`, or the ledger knows of fewer steps of the run than the server.
            OSError: the file cannot be written.
        """
        with self._locked():
            entries = self.entries()
            known = sum(e.steps.count for e in entries if e.run == run)
            if known < at_least:
                raise ConfigError(
                    f"the node's privacy ledger {self.path.name} knows of {known} steps of this run, the server of "
                    f"{at_least}: restore it from a copy"
                )
            after, now = [], datetime.now(UTC).isoformat(timespec="seconds")
            new = Entry(run, steps, now, now)
            for entry in entries:
                kind = replace(entry.steps, count=steps.count)
                if (entry.run, kind) == (run, steps):
                    steps_so_far = replace(steps, count=entry.steps.count + steps.count)
                    new = replace(new, first=entry.first, steps=steps_so_far)
                else:
                    after.append(entry)
            after.append(new)
            costs = _affordable(after, run, limits)
            goes_on = _within(_costs([*after, replace(new, steps=steps)], run, limits), limits)
            self._write(after)
            return Spent(*costs, goes_on)

    def check(self, run: str, steps: Steps, limits: Limits) -> None:
        """Finds out whether steps could be taken.

        Raises:
            BudgetSpentError, ConfigError: as `spend`.
        """
        _affordable([*self.entries(), Entry(run, steps, "", "")], run, limits)

    def _write(self, entries: list[Entry]) -> None:
        lines = [
            {
                "run": e.run,
                "sampling": e.steps.sampling,
                "noise": e.steps.noise,
                "steps": e.steps.count,
                "first": e.first,
                "last": e.last,
            }
            for e in entries
        ]
        with whole_file(self.path) as file:
            file.write(json.dumps({"format": _FORMAT, "entries": lines}, indent=1).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes of this machine out: two may not spend the same rest."""
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync(self.path.parent.parent)
        with FileLock(f"{self.path}.lock"):
            yield


def _steps(sampling: float, noise: float, count: int) -> Steps:
    if not (0 < sampling <= 1 and 0 < noise < math.inf and type(count) is int and count > 0):
        raise ValueError(f"sampling {sampling!r}, noise {noise!r}, steps {count!r}")
    return Steps(float(sampling), float(noise), count)


def _costs(entries: list[Entry], run: str, limits: Limits) -> tuple[float, float]:
    """Returns what a run and all runs have cost."""
    own = epsilon([e.steps for e in entries if e.run == run], limits.run_delta)
    return own, epsilon([e.steps for e in entries], limits.node_delta)


def _within(costs: tuple[float, float], limits: Limits) -> bool:
    run, total = costs
    return run <= limits.run and total <= limits.node


def _affordable(entries: list[Entry], run: str, limits: Limits) -> tuple[float, float]:
    """Returns what a run and all runs cost.

    Raises:
        BudgetSpentError: that is more than the limits allow.
    """
    own, total = costs = _costs(entries, run, limits)
    if _within(costs, limits):
        return costs
    which, cost = f"privacy.epsilon = {limits.run:g} is spent at this node", own
    if not total <= limits.node:
        which, cost = f"dp-epsilon = {limits.node:g} of this node is spent", total
    raise BudgetSpentError(f"{which}: another round would make it {cost:.4g}")
