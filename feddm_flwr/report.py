"""`report.html` and the model card, made from the files of a run directory and nothing else."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from feddm_flwr.report_page import PAGE
from feddm_flwr.tracking import Row, read_metrics

Points = Sequence[tuple[float, float]]


def write(run: Path) -> Path:
    """Write the self-contained `report.html` of a run; it can be rewritten at any time."""
    rows = read_metrics(run)
    status = _read_json(run / "status.json", {"status": "running", "reason": ""})
    with (run / "config.toml").open("rb") as file:
        config = _flat(tomllib.load(file))
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    html = page.render(
        name=run.name,
        status=status,
        config=config,
        rows=rows,
        tiles=_tiles(rows, config),
        charts=_charts(rows),
        grids=(grids := _grids(run)),
        slides=[{"round": g["round"], "ema": g["ema"]} for g in grids],
        nodes=_nodes(_read_json(run / "nodes.json", []), rows),
        command=f"feddm run --num-supernodes {len(_read_json(run / 'nodes.json', [])) or 4} "
        + " ".join(f"-c '{key}={_toml(config[key])}'" for key in sorted(config) if key not in ("run-name", "out-dir")),
    )
    path = run / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def model_card(config: Mapping[str, object], rounds: int, nodes: int) -> str:
    """The README.md of a pipeline folder."""
    size = config["data.image-size"]
    keys = (
        "strategy",
        "data.name",
        "data.partition",
        "train.local-steps",
        "train.local-epochs",
        "train.learning-rate",
        "codec.uplink",
        "codec.downlink",
        "server.optimizer",
        "server.ema-decay",
        "seed",
    )
    table = "\n".join(f"| `{key}` | `{config[key]}` |" for key in keys)
    what, code = _use(config)
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusers, federated-learning, feddm]
---
# A diffusion model trained by {nodes} nodes that kept their images

{what} for {size}x{size} images, trained with FedDM (Vora et al., arXiv 2407.14730; settings ours)
over {rounds} rounds. The weights are the exponential moving average of the global model.

```python
{code}
```

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
    pipeline = "LDMPipeline" if config["model.kind"] == "ldm" else "DDPMPipeline"
    code = f"from diffusers import {pipeline}\n\nimages = {pipeline}.from_pretrained({folder})(batch_size=16).images"
    return f"A `UNet2DModel` ({config['model.kind']})", code


def megabytes(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def traffic(rows: list[Row]) -> list[str]:
    """What a run's exchange cost, in two lines."""
    total = _totals(rows)
    return [f"{who}: {megabytes(sent)}, {note}" for who, sent, note in _traffic(total) if sent]


def _totals(rows: list[Row]) -> dict[str, int]:
    return {key: sum(row.get(key, 0) for row in rows) for key in rows[-1] if key.startswith("bytes_")}


def _traffic(total: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """(who, bytes, how that compares) for either direction."""
    result = []
    for who, way in (("sent by the nodes", "up"), ("sent by the server", "down")):
        sent = total[f"bytes_{way}"]
        note = f"{_times(total.get(f'bytes_{way}_fp32', 0), sent)} less than float32"
        if everything := total.get("bytes_data_parallel"):
            note += f", {_times(everything, sent)} less than gradients after every step"
        if way == "down" and total.get("bytes_full"):
            note += f"; {megabytes(total['bytes_full'])} of it whole models for nodes without them"
        result.append((who, sent, note))
    return result


def _times(more: int, less: int) -> str:
    ratio = more / max(less, 1)
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _tiles(rows: list[Row], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(value, label, note) of the figures at the head."""
    if not rows:
        return []
    last = rows[-1]
    evaluated = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
    failed = sum(row["clients_failed"] for row in rows)
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
        *((megabytes(sent), who, note) for who, sent, note in _traffic(_totals(rows))),
        (str(failed), "failed replies", f"of {failed + sum(r['clients_ok'] for r in rows)}"),
    ]


def _charts(rows: list[Row]) -> list[tuple[str, Markup]]:
    if not rows:
        return []
    loss = {
        "training": [(r["round"], r["train_loss"]) for r in rows],
        # A round evaluates the weights it starts from: those of the round before.
        "held-out": [(r["round"] - 1, r["eval_loss"]) for r in rows if r["eval_loss"] is not None],
    }
    # The untrained model's loss would flatten everything after it.
    loss["held-out"] = [p for p in loss["held-out"] if p[0] > 0] or loss["held-out"]
    traffic = {
        "up": [(r["round"], r["bytes_up"] / 1e6) for r in rows],
        "down": [(r["round"], r["bytes_down"] / 1e6) for r in rows],
    }
    return [("Loss by round", _line_chart(loss)), ("Megabytes by round", _line_chart(traffic, zero=True))]


def _line_chart(series: Mapping[str, Points], *, zero: bool = False) -> Markup:
    """An inline SVG with one line per series, which takes its colours from the page."""
    width, height, left, bottom, top, right = 560, 260, 56, 28, 24, 12
    points = [p for line in series.values() for p in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = 0.0 if zero else min(y for _, y in points), max(y for _, y in points)
    x1, pad = (x1 if x1 > x0 else x0 + 1), (y1 - y0) * 0.08 or abs(y1) * 0.1 or 1
    y0, y1 = (0.0 if zero else y0 - pad), y1 + pad

    def at(x: float, y: float) -> str:
        px = left + (x - x0) / (x1 - x0) * (width - left - right)
        py = top + (1 - (y - y0) / (y1 - y0)) * (height - top - bottom)
        return f"{px:.1f},{py:.1f}"

    parts = []
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        (ax, ay), (bx, _) = at(x0, y).split(","), at(x1, y).split(",")
        parts.append(f'<line class="axis" x1="{ax}" y1="{ay}" x2="{bx}" y2="{ay}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{float(ay) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    ticks = sorted({round(x0 + (x1 - x0) * i / 4) for i in range(5)})
    parts += [
        f'<text class="tick" x="{at(x, y0).split(",")[0]}" y="{height - 8}" text-anchor="middle">{x}</text>'
        for x in ticks
    ]
    for i, (label, line) in enumerate(series.items()):
        parts.append(f'<polyline class="line s{i}" points="{" ".join(at(x, y) for x, y in line)}"/>')
        parts += [
            f'<circle class="dot s{i}" r="2.5" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}"/>'
            for p in (at(x, y) for x, y in line)
        ]
        parts.append(
            f'<text class="label s{i}" x="{width - right - 90 * (len(series) - 1 - i)}" y="14" '
            f'text-anchor="end">● {label}</text>'
        )
    names = " and ".join(series)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{names} by round">{"".join(parts)}</svg>'
    )


def _grids(run: Path) -> list[dict[str, object]]:
    """The grids in order of round, as data URIs: the averaged weights', and the raw weights' of the last round."""

    def uri(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else ""

    averaged = sorted(p for p in (run / "samples").glob("round-*.png") if not p.stem.endswith("-raw"))
    return [{"round": int(p.stem[6:]), "ema": uri(p), "raw": uri(p.with_name(f"{p.stem}-raw.png"))} for p in averaged]


def _nodes(nodes: list[Row], rows: list[Row]) -> list[Row]:
    """The nodes with what each sent and got, and with the share of each class, for the bars."""
    classes = sorted({c for node in nodes for c in node["class_counts"]})
    for node in nodes:
        total = max(1, sum(node["class_counts"].values()))
        for way in ("up", "down"):
            node[way] = megabytes(sum(row.get("nodes", {}).get(node["name"], {}).get(way, 0) for row in rows))
        node["bars"] = [
            {
                "name": c,
                "count": node["class_counts"].get(c, 0),
                "share": node["class_counts"].get(c, 0) / total,
                "hue": round(360 * i / len(classes)),
            }
            for i, c in enumerate(classes)
        ]
    return nodes


def _read_json(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _toml(value: object) -> str:
    return json.dumps(value)  # the same for numbers, booleans and text without control characters
