"""`report.html` and the model card, made from the files of a run directory and nothing else."""

from __future__ import annotations

import base64
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from feddm_flwr import charts
from feddm_flwr.report_page import COMPARISON, PAGE
from feddm_flwr.tracking import (
    OF_THE_FOLDER,
    Row,
    flat,
    grid_files,
    read_metrics,
    read_status,
    simulated_nodes,
    total_bytes,
    without_places,
)
from feddm_flwr.whole_file import whole_file


def write(run: Path) -> Path:
    """Write the self-contained `report.html` of a run; it can be rewritten at any time."""
    rows = read_metrics(run)
    status = {"status": "running", "reason": ""} | read_status(run)
    config, final = _config(run), _read_json(run / "final.json", {})
    nodes = _read_json(run / "nodes.json", [])
    hues = _hues(nodes)
    html = _render(
        PAGE,
        name=run.name,
        status=status,
        config=config,
        rows=rows,
        tiles=_tiles(rows, config, final),
        charts=charts.of_run(rows, apart=bool(config.get("diffusion.min-snr-gamma"))),
        judged=_judged(run, rows),
        final=final,
        faults=_faults(rows, status),
        grids=(grids := [_grid(*grid) for grid in grid_files(run).items()]),
        slides=[{"round": g["round"], "ema": g["ema"]} for g in grids],
        nodes=_nodes(nodes, rows, hues),
        hues=hues,
        command=" ".join(
            [
                "feddm run",
                f"--num-supernodes {simulated_nodes(rows) or 4}" if status.get("simulated", True) else "SUPERLINK",
                *(f"-c {shlex.quote(f'{k}={_toml(config[k])}')}" for k in sorted(config) if k not in OF_THE_FOLDER),
            ]
        ),
    )
    return _written(run / "report.html", html)


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Write one self-contained page that compares runs.

    Raises:
        ValueError: two runs have the same name.
    """
    names = [run.name for run in runs]
    if len({*names}) < len(names):
        raise ValueError(f"two runs have the same name: {', '.join(names)}")
    rows = {run.name: read_metrics(run) for run in runs}
    configs = {run.name: _config(run) for run in runs}
    keys = [k for k in configs[names[0]] if k not in ("strategy", *OF_THE_FOLDER)]
    differing = [k for k in keys if len({str(c.get(k)) for c in configs.values()}) > 1]
    nodes = {name: simulated_nodes(own) for name, own in rows.items()}
    figures = {name: _figures(own) for name, own in rows.items()}
    heads = list(dict.fromkeys(h for f in figures.values() for h in f))
    judged = {run.name: _judged(run, rows[run.name]) for run in runs}
    settings: dict[str, list[str]] = {}
    for name, found in judged.items():
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
                + [f"{k}={_toml(configs[run.name].get(k))}" for k in differing]
            )
            or "the same configuration",
            "cells": [figures[run.name].get(head, "–") for head in heads],
            "grid": next((_grid(*last) for last in reversed(grid_files(run).items())), None),
        }
        for run in runs
    ]
    html = _render(COMPARISON, name="Comparison of runs", runs=shown, heads=heads, notes=notes, charts=_compared(rows))
    return _written(path, html)


def _written(path: Path, html: str) -> Path:
    with whole_file(path) as file:
        file.write(html.encode())
    return path


def _figures(rows: list[Row]) -> dict[str, str]:
    """What a run came to, by its column."""
    if not rows:
        return {}
    total = total_bytes(rows)
    found = {"rounds": str(rows[-1]["round"]), "training loss": f"{rows[-1]['train_loss']:.4f}"}
    for key, head in (("eval_loss", "held-out loss"), ("fid", "FID"), ("kid", "KID"), ("coverage", "coverage")):
        if values := [row[key] for row in rows if row.get(key) is not None]:
            found[head] = f"{values[-1]:.4g}"
    found |= {f"sent {way}": megabytes(total[f"bytes_{way}"]) for way in ("up", "down")}
    return found | {"seconds": f"{sum(r['seconds'] for r in rows):.0f}"}


def _compared(rows: Mapping[str, list[Row]]) -> list[tuple[str, Markup]]:
    """Curves of several runs in one chart each."""

    def curve(own: list[Row], key: str) -> list[tuple[float, float]]:
        return charts.held_out(own) if key == "eval_loss" else charts.points(own, key)

    found = []
    for key, title in (("train_loss", "Training loss"), ("eval_loss", "Held-out loss"), ("fid", "FID"), ("kid", "KID")):
        series = {name: points for name, own in rows.items() if (points := curve(own, key))}
        if any(len(points) > 1 for points in series.values()):
            found.append((f"{title} by round", charts.lines(series, colours=[*rows])))
    key = "fid" if any(r.get("fid") is not None for own in rows.values() for r in own) else "eval_loss"
    ends = {}
    for name, own in rows.items():
        points = curve(own, key)
        if until := [r for r in own if points and r["round"] <= points[-1][0]]:
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


def _judged(run: Path, rows: list[Row]) -> dict[str, Any]:
    """What FID and so on depend on, and the last coverage; empty where there are none."""
    last: Row = next((row for row in reversed(rows) if row.get("fid") is not None), {})
    if not last:
        return {}
    facts = _read_json(run / "reference" / "facts.json", {})
    unknown = {"features": "?", "images": 0, "keys": _config(run)}
    return {**unknown, **facts, "coverage": last.get("coverage_by_class")}


def _faults(rows: list[Row], status: Row) -> list[str]:
    """What went wrong and did not end the run."""
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.get("failures", {}))
    found = [f"{n} replies dropped: {reason}" for reason, n in reasons.most_common()]
    found += [f"resumed after round {number}" for number in status.get("resumed_after", [])]
    if lost := sum(row.get("state_lost", 0) for row in rows):
        found.append(f"{lost} times a node had lost what it had kept, and began anew")
    return found


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    try:
        return flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _render(template: str, **values: Any) -> str:
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(**values)


def model_card(config: Mapping[str, object], rounds: int, nodes: int, *, simulated: bool) -> str:
    """The README.md of a pipeline folder."""
    size = config["data.image-size"]
    keys = (
        "strategy",
        "data.name",
        *(["data.partition"] if simulated else []),
        "train.local-steps",
        "train.local-epochs",
        "train.learning-rate",
        "codec.uplink",
        "codec.downlink",
        "server.optimizer",
        "server.ema-decay",
        "seed",
    )
    shown = without_places(config)
    table = "\n".join(f"| `{key}` | `{shown[key]}` |" for key in keys)
    what, code = _use(config)
    diffusion = config["stage"] == "diffusion"
    title = "A diffusion model" if diffusion else "An autoencoder"
    tag = "pipeline_tag: unconditional-image-generation\n" if diffusion else ""
    # With 61, diffusers' "trailing" spacing ends one step too far.
    note = f"\nTake a number of steps that divides {config['diffusion.timesteps']}: some others give noise.\n"
    return f"""---
library_name: diffusers
{tag}tags: [diffusers, federated-learning, feddm]
---
# {title} trained by {nodes} nodes that kept their images

{what} for {size}x{size} images, trained with FedDM (Vora et al., arXiv 2407.14730; settings ours)
over {rounds} rounds. The weights are the exponential moving average of the global model.

```python
{code}
```
{note if diffusion and not config["model.class-conditional"] else ""}
| setting | value |
|---|---|
{table}

No image left a node, but this is not a privacy guarantee: a diffusion model can memorize training
images, and averaged updates can be inverted. Treat the model as you would treat the images.
"""


def _use(config: Mapping[str, object]) -> tuple[str, str]:
    """What is in a model's folder, and how it is used with diffusers."""
    folder = '"path/to/this/folder"'
    if config["stage"] == "autoencoder":
        code = f"from diffusers import AutoencoderKL\n\nautoencoder = AutoencoderKL.from_pretrained({folder})"
        return "An `AutoencoderKL`", code
    if config["model.class-conditional"]:
        names = str(config["data.classes"]).split(",")
        code = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({folder}, trust_remote_code=True)  # pipeline.py, in this folder
images = pipeline(["{names[0].strip()}", "{names[-1].strip()}"], guidance_scale=2.0).images"""
        return f"A class-conditional `UNet2DModel` ({config['model.kind']}, classes {config['data.classes']})", code
    # The folder's own, DDPMPipeline, would take all of the noise levels.
    pipeline = "LDMPipeline" if config["model.kind"] == "ldm" else "DDIMPipeline"
    code = f"""from diffusers import {pipeline}

images = {pipeline}.from_pretrained({folder})(batch_size=16, num_inference_steps=50).images"""
    return f"A `UNet2DModel` ({config['model.kind']})", code


def megabytes(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def traffic(run: Path) -> list[str]:
    """What a run's exchange cost, in a few lines."""
    found = _traffic(read_metrics(run), _read_json(run / "final.json", {}))
    return [f"{who}: {megabytes(sent)}, {note}" for who, sent, note in found if sent]


def _traffic(rows: list[Row], final: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(who, bytes, how that compares) for either direction."""
    result, total = [], total_bytes(rows)
    for who, way in (("sent by the nodes", "up"), ("sent by the server", "down")):
        sent = total[f"bytes_{way}"]
        note = f"{_times(total.get(f'bytes_{way}_fp32', 0), sent)} less than float32"
        if everything := total.get("bytes_data_parallel"):
            note += f", {_times(everything, sent)} less than gradients after every step"
        if way == "down" and total.get("bytes_full"):
            note += f"; {megabytes(total['bytes_full'])} of it whole models for nodes without them"
        result.append((who, sent, note))
    if other := total.get("bytes_other", 0) + final.get("bytes_other", 0):
        result.append(
            ("sent beside the training", other, "models it builds upon, feature network and sums, evaluation")
        )
    return result


def _times(more: int, less: int) -> str:
    ratio = more / max(less, 1)
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _tiles(rows: list[Row], config: Mapping[str, Any], final: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(value, label, note) of the figures at the head."""
    if not rows:
        return []
    last = rows[-1]
    evaluated = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
    failed = sum(sum(row["failures"].values()) for row in rows)
    return [
        (
            f"{last['round']} / {config['num-server-rounds']}",
            "rounds",
            f"{sum(r['seconds'] for r in rows):.0f} s in rounds",
        ),
        (f"{last['train_loss']:.4f}", "training loss", "mean of the last round"),
        (
            f"{evaluated[-1]:.4f}" if evaluated else "–",
            "held-out loss",
            "weights that the last evaluated round began with",
        ),
        *(
            (
                f"{r['fid']:.3g}",
                "FID of the averaged weights",
                f"round {r['round']}; KID {r['kid']:.3g}" if r.get("kid") is not None else f"round {r['round']}",
            )
            for r in [r for r in rows if r.get("fid") is not None][-1:]
        ),
        *((megabytes(sent), who, note) for who, sent, note in _traffic(rows, final)),
        (str(failed), "failed replies", f"of {failed + sum(r['clients_ok'] for r in rows)}"),
    ]


def _grid(number: int, path: Path) -> dict[str, object]:
    """A round's grids as data URIs: the averaged weights', and the raw weights' where they were drawn."""

    def uri(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else ""

    return {"round": number, "ema": uri(path), "raw": uri(path.with_name(f"{path.stem}-raw.png"))}


def _nodes(nodes: list[Row], rows: list[Row], hues: Mapping[str, int]) -> list[Row]:
    """The nodes with what each sent and got, and with the share of each class, for the bars."""
    for node in nodes:
        total = max(1, sum(node["class_counts"].values()))
        for way in ("up", "down"):
            node[way] = megabytes(sum(row.get("nodes", {}).get(node["name"], {}).get(way, 0) for row in rows))
        node["bars"] = [
            {"name": name, "count": count, "share": count / total, "hue": hues[name]}
            for name, count in sorted(node["class_counts"].items())
        ]
    return sorted(nodes, key=lambda node: [p.zfill(9) if p.isdigit() else p for p in re.split(r"(\d+)", node["name"])])


def _hues(nodes: list[Row]) -> dict[str, int]:
    """The colour of each class."""
    classes = sorted({name for node in nodes for name in node["class_counts"]})
    return {name: round(360 * i / len(classes)) for i, name in enumerate(classes)}


def _read_json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _toml(value: object) -> str:
    return json.dumps(value)  # the same for numbers, booleans and text without control characters
