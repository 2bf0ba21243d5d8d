"""Inline SVG for reports: it takes its colours from the page, and fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from feddm_flwr.reporting.records import RoundRecord

Points = Sequence[tuple[float, float]]

COLOURS = 8  # that a page has, s0 to s7
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 270, 80, 16, 10, 52


def of_run(rows: Sequence[RoundRecord], *, apart: bool = False) -> list[tuple[str, Markup]]:
    """Returns a run's charts, with their titles; `apart`: training and held-out loss are not of the same weights."""
    if not rows:
        return []
    loss: dict[str, Points] = {
        "training": [(r.round, r.train_loss) for r in rows],
        "held-out": held_out(rows),
    }
    traffic = {
        "up": [(r.round, r.bytes_up / 1e6) for r in rows],
        "down": [(r.round, r.bytes_down / 1e6) for r in rows],
    }
    # An autoencoder's training loss is of other terms than its held-out one.
    if apart or any(r.psnr is not None for r in rows):
        charts = [(f"{name.capitalize()} loss by round", lines({name: of})) for name, of in loss.items() if of]
    else:
        charts = [("Loss by round", lines({name: of for name, of in loss.items() if of}))]
    charts.append(("Megabytes by round", lines(traffic, zero=True)))
    for key, title in (("fid", "FID by round"), ("kid", "KID by round"), ("psnr", "PSNR in dB by round")):
        if len(found := points(rows, key, -1 if key == "psnr" else 0)) > 1:
            charts.append((title, lines({title.split()[0]: found})))
    if levels := [r for r in rows if r.eval_levels]:
        ends = {f"round {r.round - 1}": r.eval_levels for r in (levels[-1], levels[0])}
        tenths = {name: [(10.0 * (i + 1), v) for i, v in enumerate(of)] for name, of in ends.items()}
        charts.append(("Held-out loss by noise level", lines(tenths, across="noise level, % of the time steps")))
    gauges = {
        "drift of the nodes": points(rows, "drift"),
        "contraction": points(rows, "contraction"),
    }
    if any(gauges.values()):
        charts.append(("Gauges", lines({name: p for name, p in gauges.items() if p})))
    if found := points(rows, "lipschitz"):
        charts.append(("Steepness of the denoiser", lines({"Lipschitz constant, at least": found})))
    return charts


def points(rows: Sequence[RoundRecord], key: str, later: int = 0) -> list[tuple[float, float]]:
    """Returns a figure by round, as many rounds `later`, where there is one."""
    return [(r.round + later, value) for r in rows if (value := r.figure(key)) is not None]


def held_out(rows: Sequence[RoundRecord]) -> list[tuple[float, float]]:
    """Returns the held-out loss by the round whose weights it is of: a round evaluates those it starts from. The
    untrained model's would flatten everything after it."""
    found = points(rows, "eval_loss", -1)
    return [p for p in found if p[0] > 0] or found


def lines(
    series: Mapping[str, Points], *, zero: bool = False, across: str = "round", colours: Sequence[str] = ()
) -> Markup:
    """Returns a line for each series, by `across`; its colour is by its place in `colours`, or among the series."""
    return _chart(series, zero=zero, across=across, joined=True, order=colours or [*series])


def dots(series: Mapping[str, Points], across: str, colours: Sequence[str]) -> Markup:
    """Returns a dot for each point, by `across` on a logarithmic axis; colours as in `lines`."""
    logs = {name: [(math.log10(x), y) for x, y in of] for name, of in series.items()}
    return _chart(logs, zero=False, across=across, joined=False, order=colours)


def _chart(series: Mapping[str, Points], *, zero: bool, across: str, joined: bool, order: Sequence[str]) -> Markup:
    colour = {name: f"s{i % COLOURS}" for i, name in enumerate(order)}
    every = [p for line in series.values() for p in line]
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = 0.0 if zero else min(y for _, y in every), max(y for _, y in every)
    if x1 == x0:
        x1 = x0 + 1
    if not joined:
        x0, x1 = x0 - 0.05 * (x1 - x0), x1 + 0.05 * (x1 - x0)
    pad = (y1 - y0) * 0.08 or abs(y1) * 0.1 or 1
    y0, y1 = (0.0 if zero else y0 - pad), y1 + pad
    digits = max(3, math.ceil(math.log10(max(abs(y0), abs(y1)) / (y1 - y0))) + 2)  # that tell the ticks apart

    def at(x: float, y: float) -> tuple[float, float]:
        px = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return px, _TOP + (1 - (y - y0) / (y1 - y0)) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        (ax, ay), (bx, _) = at(x0, y), at(x1, y)
        parts.append(f'<line class="axis" x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{ay:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{ay + 4:.1f}" text-anchor="end">{y:.{digits}g}</text>')
    for x in sorted({round(x0 + (x1 - x0) * i / 4, 0 if joined else 2) for i in range(5)}):
        label = f"{x:g}" if joined else f"{10**x:.3g}"
        parts.append(
            f'<text class="tick" x="{at(x, y0)[0]:.1f}" y="{_HEIGHT - 30}" text-anchor="middle">{label}</text>'
        )
    parts.append(f'<text class="tick" x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>')
    for name, line in series.items():
        places = [at(x, y) for x, y in line]
        if joined:
            parts.append(
                f'<polyline class="line {colour[name]}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
            )
        size = 2.5 if joined else 6
        parts += [
            f'<circle class="dot {colour[name]}" r="{size}" cx="{x:.1f}" cy="{y:.1f}">'
            f"<title>{escape(name)}: {of[1]:.4g}</title></circle>"
            for (x, y), of in zip(places, line, strict=True)
        ]
    names = [f'<span class="label {colour[name]}">● {escape(name)}</span>' for name in series]
    spoken = escape(f"{' and '.join(series)} by {across}")
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'
        f'<p class="legend">{" ".join(names)}</p>'
    )
