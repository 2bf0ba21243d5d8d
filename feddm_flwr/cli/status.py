"""`feddm status`: how far a run is, from its folder; or what goes on at a SuperLink, from Flower's commands."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from feddm_flwr.cli.launch import Remote, flwr
from feddm_flwr.config import ConfigError
from feddm_flwr.reporting.progress import MARK, RoundDone, parse
from feddm_flwr.reporting.records import RoundRecord, read_config, read_rounds, read_status, total_bytes
from feddm_flwr.reporting.traffic import megabytes

_RECENT = 5  # rounds that say how long another takes
_LISTED = 5  # runs of a SuperLink
_FAILED = 3  # kinds of failures that are named


def newest_run(out_dir: Path) -> Path | None:
    """Returns the run in a folder that was written to last; None where there is none."""
    found = [path.parent for path in out_dir.glob("*/config.toml")]
    return max(found, key=_changed, default=None)


def of_run(run: Path) -> list[str]:
    """Returns what there is to say of a run in this folder.

    Raises:
        ConfigError: its files are damaged.
    """
    try:
        rounds, status, config = read_rounds(run), read_status(run), read_config(run)
    except ValueError as error:
        raise ConfigError(f"RUN: {error}") from error
    asked, done = int(config["num-server-rounds"]), rounds[-1].round if rounds else 0
    state = str(status.get("status", "running"))
    lines = [f"{run}: {state}, round {done} of {asked}{_left(rounds, asked) if state == 'running' else ''}"]
    if state != "running" and (reason := str(status.get("reason", ""))):
        lines.append(f"  why       {reason}")
    if not rounds:
        return lines
    last, failed = rounds[-1], Counter[str]()
    for one in rounds:
        failed.update(one.failures)
    figures = [f"training {last.train_loss:.4f}"]
    for name, label in (("eval_loss", "held-out"), ("fid", "FID"), ("epsilon", "ε")):
        if at := next((r for r in reversed(rounds) if r.figure(name) is not None), None):
            figures.append(f"{label} {at.figure(name):.4g} (round {at.round})")
    lines.append(f"  figures   {', '.join(figures)}")
    lines.append(f"  nodes     {last.connected or last.clients_ok} online, {last.clients_ok} replies in the last round")
    if failed:
        most = ", ".join(f"{n} {reason}" for reason, n in failed.most_common(_FAILED))
        when = max(r.round for r in rounds if r.failures)
        lines.append(f"  failures  {sum(failed.values())} replies: {most}; last in round {when}")
    total = total_bytes(rounds)
    lines.append(f"  bytes     {megabytes(total['bytes_up'])} up, {megabytes(total['bytes_down'])} down")
    ago = _span(time.time() - _changed(run))
    lines.append(f"  last word {ago} ago{'; a round takes ' + _span(_usual(rounds)) if state == 'running' else ''}")
    return lines


def of_superlink(federation: Remote) -> list[str]:
    """Returns what goes on at a SuperLink.

    Raises:
        ConfigError: it does not answer.
    """
    nodes = Counter(str(node.get("status")) for node in _asked(federation, "nodes", "supernode", "list"))
    runs = _asked(federation, "runs", "list", f"--limit={_LISTED}")
    lines = [f"nodes: {', '.join(f'{n} {what}' for what, n in sorted(nodes.items())) or 'none'}"]
    for run in runs:
        elapsed = run.get("elapsed", "")  # Flower 1.42 has a number, which others may have as text
        took = _span(elapsed) if isinstance(elapsed, int | float) else elapsed
        lines.append(f"run {run.get('run-id')}: {run.get('status')}, {took}".rstrip(", "))
        if run.get("status") == "running":
            log = flwr(federation, "log", "--show", str(run.get("run-id"))).stdout.splitlines()
            said = (parse(line.partition(MARK)[2]) for line in reversed(log))
            if done := next((one for one in said if isinstance(one, RoundDone)), None):
                left = _span((done.rounds - done.round) * done.seconds)
                lines.append(
                    f"  round {done.round} of {done.rounds}, loss {done.loss:.4f}, {done.ok} replies, {done.failed} "
                    f"failed, {done.seconds:.0f} s a round, about {left} left"
                )
    return lines if runs else [*lines, "runs: none"]


def _asked(federation: Remote, what: str, *command: str) -> list[dict[str, Any]]:
    done = flwr(federation, *command, "--format=json")
    said = done.stdout or done.stderr
    try:
        found: list[dict[str, Any]] = json.loads(said)[what]
    except (ValueError, LookupError, TypeError) as error:
        with suppress(ValueError, LookupError, TypeError):
            said = str(json.loads(said)["error-message"])
        why = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it says nothing")
        raise ConfigError(f"SUPERLINK: {why}") from error
    return found


def _left(rounds: list[RoundRecord], asked: int) -> str:
    if not rounds or rounds[-1].round >= asked:
        return ""
    return f", about {_span((asked - rounds[-1].round) * _usual(rounds))} left"


def _usual(rounds: list[RoundRecord]) -> float:
    return median(one.seconds for one in rounds[-_RECENT:])


def _changed(run: Path) -> float:
    """Returns when a run's figures were written last."""
    return max(file.stat().st_mtime for name in ("metrics.jsonl", "config.toml") if (file := run / name).exists())


def _span(seconds: float) -> str:
    """Returns a time as people say it."""
    for size, unit, small in ((86400, "d", 3600), (3600, "h", 60), (60, "min", 1)):
        if seconds >= size:
            rest = int(seconds % size // small)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {'h' if unit == 'd' else 'min'}" * (unit != "min"))
    return f"{seconds:.0f} s"
