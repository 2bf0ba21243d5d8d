"""What the pages of reports have in common."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from feddm_flwr.reporting.records import (
    RoundRecord,
    read_config,
    read_json,
)
from feddm_flwr.storage.atomic import whole_file


def write_page(path: Path, html: str) -> Path:
    with whole_file(path) as file:
        file.write(html.encode())
    return path


def evaluation_settings(run: Path, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """Returns what FID and so on depend on, and the last coverage; empty where there are none."""
    last = next((r for r in reversed(rounds) if r.fid is not None), None)
    if not last:
        return {}
    facts = read_json(run / "reference" / "facts.json", {})
    unknown = {"features": "?", "images": 0, "keys": read_config(run)}
    return {**unknown, **facts, "coverage": last.coverage_by_class}


def render(template: str, **values: Any) -> str:
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(**values)


def grid_images(number: int, path: Path) -> dict[str, object]:
    """Returns a round's grids as data URIs: the averaged weights', and the raw weights' where they were drawn."""

    def uri(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else ""

    return {"round": number, "ema": uri(path), "raw": uri(path.with_name(f"{path.stem}-raw.png"))}


def toml_value(value: object) -> str:
    return json.dumps(value)  # the same for numbers, booleans and text without control characters
