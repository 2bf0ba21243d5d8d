"""`report.html` and the model card, made from the files of a run directory and nothing else."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feddm_flwr.reporting import charts
from feddm_flwr.reporting.page import evaluation_settings, grid_images, render, toml_value, write_page
from feddm_flwr.reporting.records import (
    OF_THE_FOLDER,
    RoundRecord,
    Row,
    epsilon_spent,
    grid_files,
    read_config,
    read_json,
    read_rounds,
    read_status,
    simulated_nodes,
)
from feddm_flwr.reporting.templates import PAGE
from feddm_flwr.reporting.traffic import megabytes, traffic_rows


def write(run: Path) -> Path:
    """Writes the self-contained `report.html` of a run; it can be rewritten at any time."""
    rows = read_rounds(run)
    status = {"status": "running", "reason": ""} | read_status(run)
    config, final = read_config(run), read_json(run / "final.json", {})
    nodes = read_json(run / "nodes.json", [])
    hues = _hues(nodes)
    html = render(
        PAGE,
        name=run.name,
        status=status,
        config=config,
        rows=rows,
        tiles=_tiles(rows, config, final),
        charts=charts.of_run(rows, apart=bool(config.get("diffusion.min-snr-gamma"))),
        evaluated=evaluation_settings(run, rows),
        final=final,
        faults=_faults(rows, status),
        grids=(grids := [grid_images(*grid) for grid in grid_files(run).items()]),
        slides=[{"round": g["round"], "ema": g["ema"]} for g in grids],
        nodes=(shown := _nodes(nodes, rows, hues)),
        accounted={node["name"]: node["spent"][0] for node in shown if node["spent"]},
        private=config.get("privacy.mechanism") == "dp-sgd",
        remarks=_remarks(nodes),
        hues=hues,
        command=" ".join(
            [
                "feddm run",
                f"--num-supernodes {simulated_nodes(rows) or 4}" if status.get("simulated", True) else "SUPERLINK",
                *(
                    f"-c {shlex.quote(f'{k}={toml_value(config[k])}')}"
                    for k in sorted(config)
                    if k not in OF_THE_FOLDER
                ),
            ]
        ),
    )
    return write_page(run / "report.html", html)


def _faults(rows: Sequence[RoundRecord], status: Row) -> list[str]:
    """Returns what went wrong and did not end the run."""
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.failures)
    found = [f"{n} replies dropped: {reason}" for reason, n in reasons.most_common()]
    found += [f"resumed after round {number}" for number in status.get("resumed_after", [])]
    if lost := sum(row.state_lost for row in rows):
        found.append(f"{lost} times a node had lost what it had kept, and began anew")
    return found


def _tiles(
    rows: Sequence[RoundRecord], config: Mapping[str, Any], final: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Returns (value, label, note) of the figures at the head."""
    if not rows:
        return []
    last = rows[-1]
    evaluated = [row.eval_loss for row in rows if row.eval_loss is not None]
    of_images = config.get("privacy.mechanism") == "dp-sgd"
    unit, spender = ("image", "at the node that spent most") if of_images else ("node", "in the model")
    failed = sum(sum(row.failures.values()) for row in rows)
    return [
        (
            f"{last.round} / {config['num-server-rounds']}",
            "rounds",
            f"{sum(r.seconds for r in rows):.0f} s in rounds",
        ),
        (f"{last.train_loss:.4f}", "training loss", "mean of the last round"),
        *(
            (f"{loss:.4f}", "held-out loss", "weights that the last evaluated round began with")
            for loss in evaluated[-1:]
        ),
        *(
            (
                f"{r.fid:.3g}",
                "FID of the averaged weights",
                f"round {r.round}" + (f"; KID {r.kid:.3g}" if r.kid is not None else "") + _average(r),
            )
            for r in [r for r in rows if r.fid is not None][-1:]
        ),
        *(
            (
                f"ε = {spent:.3g}",
                f"privacy of each {unit}, δ = {config['privacy.delta']:g}",
                spender,
            )
            for spent in [epsilon_spent(rows)]
            if spent is not None
        ),
        *((megabytes(sent), who, note) for who, sent, note in traffic_rows(rows, final)),
        (str(failed), "failed replies", f"of {failed + sum(r.clients_ok for r in rows)}"),
    ]


def _average(row: RoundRecord) -> str:
    """Returns which average was chosen after a round, among how many; "" where none was."""
    return "" if row.average_width is None else f"; width {row.average_width:g}, best of {len(row.average_tried)}"


def _nodes(nodes: list[Row], rows: Sequence[RoundRecord], hues: Mapping[str, int]) -> list[Row]:
    """Returns the nodes with what each sent and got, and with the share of each class, for the bars."""
    for node in nodes:
        total = max(1, sum(node["class_counts"].values()))
        for way in ("up", "down"):
            node[way] = megabytes(sum(row.nodes.get(node["name"], {}).get(way, 0) for row in rows))
        spent = [own for row in rows if "epsilon" in (own := row.nodes.get(node["name"], {}))]
        node["spent"] = [f"{spent[-1][key]:.3g}" for key in ("epsilon", "epsilon_total")] if spent else []
        node["bars"] = [
            {"name": name, "count": count, "share": count / total, "hue": hues[name]}
            for name, count in sorted(node["class_counts"].items())
        ]
    return sorted(nodes, key=lambda node: [p.zfill(9) if p.isdigit() else p for p in re.split(r"(\d+)", node["name"])])


def _remarks(nodes: list[Row]) -> dict[str, list[tuple[str, int]]]:
    """Returns what nodes found to remark on their images: the count of each node that has it, the largest first."""
    found: dict[str, list[tuple[str, int]]] = {}
    for node in nodes:
        skipped = {"images that cannot be read": n} if (n := node.get("skipped")) else {}
        for what, count in (skipped | node.get("remarks", {})).items():  # a run of an older version has none
            found.setdefault(what, []).append((node["name"], count))
    return {what: sorted(counts, key=lambda pair: -pair[1]) for what, counts in sorted(found.items())}


def _hues(nodes: list[Row]) -> dict[str, int]:
    """Returns the colour of each class."""
    classes = sorted({name for node in nodes for name in node["class_counts"]})
    return {name: round(360 * i / len(classes)) for i, name in enumerate(classes)}
