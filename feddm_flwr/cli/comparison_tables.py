"""What a comparison came to, as tables and plots: means and spread over seeds, and the least."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from feddm_flwr.config.run_config import KEYS

Results = Sequence[dict[str, Any]]


def markdown(results: Results) -> str:
    """Returns a table for each condition."""
    parts = []
    for condition in dict.fromkeys(r["condition"] for r in results):
        own = [r for r in results if r["condition"] == condition]
        bases = _bases(own) or {"centralized": []}
        centralized = next((base for base in bases.values() if base and _pooled(base[0]) == "centralized"), [])
        lines = [f"**{condition}**\n"] if condition else []
        # Where no run is data-parallel, tables are as they were.
        more = ["images to centralized FID"] if _has_data_parallel(own) else []
        heads = ["run", "FID", "least", *(f"over {_cell(name)}" for name in bases), *more]
        heads += ["KID", "coverage", "held-out loss", "up", "down", "hours at 10 Mbit/s", "seeds"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for run in dict.fromkeys(r["run"] for r in own):
            same = [r for r in own if r["run"] == run]
            fids = [r["fid"] for r in same if r["fid"] is not None]
            over = [_over(fids, same, base) for base in bases.values()]
            over += [_images_to(same, centralized)] if more else []
            lines.append(
                f"| {_cell(run)} | {_spread(fids)} | {f'{min(fids):.4g}' if fids else '–'} | {' | '.join(over)} "
                f"| {_spread([r['kid'] for r in same if r['kid'] is not None])} "
                f"| {_spread([r['coverage'] for r in same if r['coverage'] is not None])} "
                f"| {_spread([r['eval_loss'] for r in same if r['eval_loss'] is not None])} "
                f"| {_fewer(same, 'up')} | {_fewer(same, 'down')} | {_hours(same)} | {len(same)} |"
            )
        parts.append("\n".join(lines))
    samples, features = ({r[key] for r in results if r[key]} for key in ("samples", "features"))
    parts.append(
        f"FID, KID and coverage: {_either(samples)} samples of the shipped weights against all images of the nodes, "
        f"features of {_either(features)}. "
        + ("FID of fewer than 10,000 samples depends on their number. " if min(samples, default=0) < 10_000 else "")
        + "Held-out loss: of the raw weights that the last round began with. Mean ± standard deviation over the seeds; "
        "least: of all seeds. "
        + ("Images to centralized FID: seen until a round first had it. " if _has_data_parallel(results) else "")
        + "Up and down: megabytes of the whole run, all nodes, and how many times less than float32. "
        "Hours: what a node's share of both takes on a line of its own."
    )
    return "\n\n".join(parts) + "\n"


def table(results: Results) -> str:
    """Returns every run as a line of CSV."""
    columns = [key for key in results[0] if key not in ("keys", "fid_by_round")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return text.getvalue()


def plots(results: Results, folder: Path) -> list[Path]:
    """Draws FID against bytes, rounds and conditions, as PNG files; returns their paths."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    judged = [r for r in results if r["fid"] is not None]
    names = list(dict.fromkeys(r["run"] for r in judged))
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    colour = {name: palette(i % palette.N) for i, name in enumerate(names)}
    conditions = list(dict.fromkeys(r["condition"] for r in judged))
    written = []

    def draw(name: str, columns: int, paint: Any) -> None:
        figure = Figure(figsize=(4.6 * columns + 2.4, 4), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
        paint(axes)
        axes[0].set_ylabel("FID, lower is better")
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
        handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=130)

    def by_bytes(axes: Any) -> None:
        for ax, condition in zip(axes, conditions, strict=True):
            here = [r for r in judged if r["condition"] == condition]
            for r in (r for r in here if not _pooled(r)):
                ax.plot((r["bytes_up"] + r["bytes_down"]) / 1e6, r["fid"], "o", color=colour[r["run"]], label=r["run"])
            for (name, base), style in zip(_bases(here).items(), cycle(("--", ":", "-.")), strict=False):
                if len({_setting(r) for r in here}) == 1:
                    ax.axhline(mean(r["fid"] for r in base), color="grey", linestyle=style, label=name)
            ax.set(xscale="log", xlabel="megabytes, both ways, all nodes", title=condition)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())

    def by_round(axes: Any) -> None:
        for ax, condition in zip(axes, conditions, strict=True):
            for r in (r for r in judged if r["condition"] == condition):
                rounds, fids = zip(*r["fid_by_round"], strict=True)
                ax.plot(rounds, fids, "-", color=colour[r["run"]], label=r["run"])
            ax.set(yscale="log", xlabel="round", title=condition)

    def by_condition(axes: Any) -> None:
        for name in names:
            found = [[r["fid"] for r in judged if (r["condition"], r["run"]) == (c, name)] for c in conditions]
            places, there = [i for i, fids in enumerate(found) if fids], [fids for fids in found if fids]
            spread = [stdev(fids) if len(fids) > 1 else 0 for fids in there]
            axes[0].errorbar(
                places, [mean(f) for f in there], spread, fmt="o-", capsize=3, color=colour[name], label=name
            )
        axes[0].set_xticks(range(len(conditions)), [c.replace(", ", ",\n") for c in conditions])

    if judged:
        draw("fid-by-bytes", len(conditions), by_bytes)
        if any(len(r["fid_by_round"]) > 1 for r in judged):
            draw("fid-by-round", len(conditions), by_round)
        if len(conditions) > 1:
            draw("fid-by-condition", 1, by_condition)
    return written


def _bases(results: Results) -> dict[str, Results]:
    """Returns what FIDs are divided by: the runs on all images, by name, each of all its seeds."""
    pooled = [r for r in results if _pooled(r) and r["fid"] is not None]
    return {name: [r for r in pooled if r["run"] == name] for name in dict.fromkeys(r["run"] for r in pooled)}


def _pooled(result: dict[str, Any]) -> str:
    """Returns which run on all images it is, `centralized` or `data-parallel`; "" where there are nodes."""
    return str(result.get("pooled", "centralized" if result["nodes"] == 1 else ""))


def _has_data_parallel(results: Results) -> bool:
    return any(_pooled(r) == "data-parallel" for r in results)


def _over(fids: Sequence[float], same: Results, pooled: Results) -> str:
    """Returns FIDs over those of a run on all images, where they may be divided."""
    alike = len({_setting(r) for r in (*same, *pooled)}) == 1
    return f"{mean(fids) / mean(r['fid'] for r in pooled):.3f}" if fids and pooled and alike else "–"


def _images_to(same: Results, centralized: Results) -> str:
    """Returns how many images had been seen when the FID was that of the centralized run; a dash where it never was."""
    if not centralized or len({_setting(r) for r in (*same, *centralized)}) != 1:
        return "–"
    goal = mean(r["fid"] for r in centralized)
    reached = [
        next((r["images"] * number / r["rounds"] for number, fid in r["fid_by_round"] if fid <= goal), None)
        for r in same
    ]
    seen = [images for images in reached if images is not None]
    return f"{mean(seen):,.0f}" if len(seen) == len(same) else "–"


def _setting(result: dict[str, Any]) -> str:
    """Returns what FIDs must have in common to be divided: real images, samples, how these are drawn, features."""
    keys = ("data.name", "data.split", "data.image-size", "data.channels", "sample.scheduler", "sample.steps")
    chosen = [result["keys"].get(key, KEYS[key].default) for key in keys]
    return repr([*(result.get(key) for key in ("real", "samples", "features")), *chosen])


def _cell(name: str) -> str:
    """Returns a name as a table may have it."""
    return name.replace("|", "\\|")


def _spread(values: Sequence[float], places: int = 4) -> str:
    if not values:
        return "–"
    more = f" ± {stdev(values):.{places}g}" if len(values) > 1 else ""
    return f"{mean(values):.{places}g}{more}"


def _fewer(same: Results, way: str) -> str:
    if _pooled(same[0]):
        return "–"
    sent = mean(r[f"bytes_{way}"] for r in same)
    ratio = mean(r[f"bytes_{way}_fp32"] for r in same) / sent
    return f"{sent / 1e6:.3g} MB ({ratio:.3g}x)"


def _hours(same: Results) -> str:
    """Returns how long a node's transfers take on a line of 10 Mbit/s, up after down, all nodes at the same time."""
    if _pooled(same[0]):
        return "–"
    return f"{mean((r['bytes_up'] + r['bytes_down']) / r['nodes'] for r in same) * 8 / 10e6 / 3600:.2g}"


def _either(values: set[Any]) -> str:
    return " or ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in sorted(values)) or "no"
