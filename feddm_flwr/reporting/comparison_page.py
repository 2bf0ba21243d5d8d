"""One page that compares several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from feddm_flwr.reporting import charts
from feddm_flwr.reporting.page import evaluation_settings, grid_images, render, toml_value, write_page
from feddm_flwr.reporting.records import (
    OF_THE_FOLDER,
    RoundRecord,
    epsilon_spent,
    grid_files,
    read_config,
    read_rounds,
    simulated_nodes,
    total_bytes,
    without_places,
)
from feddm_flwr.reporting.templates import COMPARISON
from feddm_flwr.reporting.traffic import megabytes


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Writes one self-contained page that compares runs.

    Raises:
        ValueError: two runs have the same name.
    """
    names = [run.name for run in runs]
    if len({*names}) < len(names):
        raise ValueError(f"two runs have the same name: {', '.join(names)}")
    rows = {run.name: read_rounds(run) for run in runs}
    configs = {run.name: read_config(run) for run in runs}
    keys = [k for k in configs[names[0]] if k not in ("strategy", *OF_THE_FOLDER)]
    differing = [k for k in keys if len({str(c.get(k)) for c in configs.values()}) > 1]
    nodes = {name: simulated_nodes(own) for name, own in rows.items()}
    figures = {name: _figures(own) for name, own in rows.items()}
    heads = list(dict.fromkeys(h for f in figures.values() for h in f))
    evaluated = {run.name: evaluation_settings(run, rows[run.name]) for run in runs}
    settings: dict[str, list[str]] = {}
    for name, found in evaluated.items():
        if found:
            own, drawn = without_places(configs[name]), found["keys"]
            how = f"{drawn['sample.steps']} steps of {drawn['sample.scheduler']}"
            real = f"{found['images']:,} images of {own['data.name']} at {own['data.image-size']}"
            text = f"features: {found['features']}; {drawn['eval.samples']} samples by {how}; {real}"
            settings.setdefault(text, []).append(name)
    notes = [f"{text} ({', '.join(of)})" if len(settings) > 1 else text for text, of in settings.items()]
    if len(settings) > 1:
        notes.append("FID and KID of different settings cannot be compared.")
    shown = [
        {
            "name": run.name,
            "config": configs[run.name],
            "differs": ", ".join(
                [f"{nodes[run.name]} nodes"] * (len({*nodes.values()}) > 1)
                + [f"{k}={toml_value(configs[run.name].get(k))}" for k in differing]
            )
            or "the same configuration",
            "cells": [figures[run.name].get(head, "–") for head in heads],
            "grid": next((grid_images(*last) for last in reversed(grid_files(run).items())), None),
        }
        for run in runs
    ]
    html = render(COMPARISON, name="Comparison of runs", runs=shown, heads=heads, notes=notes, charts=_compared(rows))
    return write_page(path, html)


def _figures(rows: Sequence[RoundRecord]) -> dict[str, str]:
    """Returns what a run came to, by its column."""
    if not rows:
        return {}
    total = total_bytes(rows)
    found = {"rounds": str(rows[-1].round), "training loss": f"{rows[-1].train_loss:.4f}"}
    for key, head in (
        ("eval_loss", "held-out loss"),
        ("fid", "FID"),
        ("kid", "KID"),
        ("coverage", "coverage"),
    ):
        if values := [value for row in rows if (value := row.figure(key)) is not None]:
            found[head] = f"{values[-1]:.4g}"
    if (spent := epsilon_spent(rows)) is not None:
        found["ε"] = f"{spent:.4g}"
    found |= {f"sent {way}": megabytes(total[f"bytes_{way}"]) for way in ("up", "down")}
    return found | {"seconds": f"{sum(r.seconds for r in rows):.0f}"}


def _compared(rows: Mapping[str, Sequence[RoundRecord]]) -> list[tuple[str, Markup]]:
    """Returns curves of several runs in one chart each."""

    def curve(own: Sequence[RoundRecord], key: str) -> list[tuple[float, float]]:
        return charts.held_out(own) if key == "eval_loss" else charts.points(own, key)

    found = []
    for key, title in (("train_loss", "Training loss"), ("eval_loss", "Held-out loss"), ("fid", "FID"), ("kid", "KID")):
        series = {name: points for name, own in rows.items() if (points := curve(own, key))}
        if any(len(points) > 1 for points in series.values()):
            found.append((f"{title} by round", charts.lines(series, colours=[*rows])))
    key = "fid" if any(r.fid is not None for own in rows.values() for r in own) else "eval_loss"
    ends = {}
    for name, own in rows.items():
        points = curve(own, key)
        if until := [r for r in own if points and r.round <= points[-1][0]]:
            total = total_bytes(until)
            ends[name] = [((total["bytes_up"] + total["bytes_down"]) / 1e6, points[-1][1])]
    if len(ends) > 1:
        found.append(
            (
                f"{'FID' if key == 'fid' else 'Held-out loss'} by bytes",
                charts.dots(ends, "megabytes both ways", [*rows]),
            )
        )
    return found
