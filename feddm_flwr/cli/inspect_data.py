"""Looking at images before a run: what there is, a contact sheet, and what each node of a simulation would get."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from feddm_flwr.config import ConfigError, parse
from feddm_flwr.config.data import Data
from feddm_flwr.config.presets import DATASETS
from feddm_flwr.data.images import Decoded, listed
from feddm_flwr.data.intensities import asked_range
from feddm_flwr.data.node_data import load_all, partitions
from feddm_flwr.data.remarks import remarks_on
from feddm_flwr.data.sources import open_named
from feddm_flwr.evaluation import grids

_GLANCED_AT = 200  # images that size and channels are guessed from
_SIZES = (256, 128, 64, 32)
_SHEET = 100  # images of a contact sheet
_LISTED = 10  # broken images that are named
_GREY = ("1", "L", "LA", "I", "F")
_DEPTHS = (8, 10, 12, 14)  # bits that a sensor may have of a file's 16
_CLASSES = 30  # that are listed one by one
_NAME = 40  # characters of a class's name


def describe(keys: Mapping[str, Any], nodes: int, output: Path) -> list[str]:
    """Returns what there is to say of the images that the run-config `keys` name; `output` gets the contact sheet and,
    for more than 0 `nodes`, a plot of the classes of each lies beside it.

    Raises:
        ConfigError: a key is wrong, or there are no images.
    """
    guessed = _guess(keys)
    config = parse({**guessed, **keys})
    # Here all that is broken is to be seen.
    images, classes, found = load_all(replace(config.data, max_broken=1))
    lines = [
        f"images   {len(images)} of {found.extent()}, {len(found.broken)} more cannot be read",
        f"modes    {_counts(found.modes)}",
        f"classes  {_counts(Counter(classes)) if classes else 'unknown'}",
        *_values(config.data, found),
    ]
    remarks = remarks_on(open_named(config.data), found, images, whole=True)
    lines += [f"note     {what}: {count}" for what, count in remarks.items()]
    lines += [f"  broken {what}" for what in listed(found.broken, _LISTED)]
    share = len(found.broken) / (len(images) + len(found.broken))
    if found.unclear:
        lines.append(f"  a run would refuse them: {found.unclear}")
    elif share > config.data.max_broken:
        lines.append(f"  a run would refuse them: more are broken than data.max-broken = {config.data.max_broken:g}")
    if not len(images):
        raise ConfigError("\n".join([*lines, f"data.name = {config.data.name!r}: no image can be read"]))
    if guessed:
        text = " ".join(f"{key}={value}" for key, value in guessed.items())
        lines.append(f"guessed  {text}")
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(images) - 1, min(_SHEET, len(images))).round().astype(int)
    order = sorted(chosen, key=lambda i: classes[i]) if classes else [*chosen]
    grids.grid(images[order]).save(output)
    lines.append(f"sheet    {output}: {len(order)} as the model sees them{', by class' if classes else ''}")
    if nodes:
        shares = partitions(config.data, config.seed, nodes)
        lines += [f"node-{i:<4} {sum(share.values())} images: {_counts(share)}" for i, share in enumerate(shares)]
        least = 2 if config.data.eval_fraction else 1
        if few := [f"node-{i}" for i, share in enumerate(shares) if sum(share.values()) < least]:
            names = ", ".join(few[:_LISTED]) + (f" and {len(few) - _LISTED} more" if len(few) > _LISTED else "")
            lines.append(f"  too few images for {names}: a node needs {least}, and is left out of a run")
        if left := len(images) + len(found.broken) - sum(sum(share.values()) for share in shares):
            lines.append(f"  {left} images of classes that no node has are left out")
        lines.append(f"plot     {_plot(shares, config.data.partition, output)}")
    return lines


def _guess(keys: Mapping[str, Any]) -> dict[str, int]:
    """Returns `data.image-size` and `data.channels` where the keys do not say them, by a glance at some images."""
    wanted = {"data.image-size", "data.channels"} - keys.keys()
    name = str(keys.get("data.name", "digits"))
    if not wanted or name in DATASETS or keys.get("data.streaming"):
        return {}
    config = parse({"data.image-size": _SIZES[0], "data.channels": 3, **keys})
    source = open_named(replace(config.data, max_broken=1))
    rows = np.linspace(0, len(source.table) - 1, min(_GLANCED_AT, len(source.table))).round().astype(int).tolist()
    out = np.empty((len(rows), config.data.channels, config.data.image_size, config.data.image_size), np.uint8)
    logger = logging.getLogger("feddm_flwr.data.images")
    logger.disabled = True  # what is broken is said afterwards, of all
    found = source.decode(rows, out)
    logger.disabled = False
    side = min((min(size) for size in found.sizes), default=_SIZES[-1])
    fits = side if len(found.sizes) == 1 and side <= _SIZES[0] else next((s for s in _SIZES if s <= side), _SIZES[-1])
    stride = 2 ** (len(config.model.block_channels) - 1)
    fits = max(fits // stride, 1) * stride
    grey = all(mode.partition(";")[0] in _GREY for mode in found.modes)
    return {k: v for k, v in {"data.image-size": fits, "data.channels": 1 if grey else 3}.items() if k in wanted}


def _values(data: Data, found: Decoded) -> list[str]:
    """Returns what to know of values of more than 8 bits."""
    values = found.values
    if values.low > values.high:
        return []
    share = values.clipped / max(1, values.count)
    lines = [
        f"values   {values.low:g} to {values.high:g}; data.black={data.black:g} data.white={data.white:g}, "
        f"beyond which {share:.1%} are clipped"
    ]
    fits = next((2**bits - 1 for bits in _DEPTHS if values.high < 2**bits), None)
    if fits and values.low >= 0 and fits < data.white and not asked_range(data):
        lines.append(f"  data.white={fits} would fit: the largest value is {values.high:g}")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    """Returns names with their counts; of many the largest and the smallest."""
    if len(counts) <= _CLASSES:
        return ", ".join(f"{name} {n}".strip() for name, n in sorted(counts.items()))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    first, last = (", ".join(f"{_short(name)} {n}" for name, n in part) for part in (ordered[:3], ordered[-3:]))
    return f"{len(counts)} of them: {first}, … {last}"


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _plot(shares: Sequence[Mapping[str, int]], partition: str, sheet: Path) -> Path:
    """Draws a bar for each node, of its images by class; the file is named after the contact sheet."""
    from matplotlib.figure import Figure

    path = sheet.with_name(f"{sheet.stem}-nodes.png")
    classes = sorted({name for share in shares for name in share})
    figure = Figure(figsize=(min(max(5.0, 0.5 * len(shares) + 3), 40), 4), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(shares))
    for i, name in enumerate(classes):
        heights = [share.get(name, 0) for share in shares]
        axes.bar(range(len(shares)), heights, bottom=bottom, label=name, color=f"C{i}" if i < 10 else None)
        bottom += heights
    axes.set(xlabel="node", ylabel="images", title=f"data.partition = {partition}")
    axes.set_xticks(range(len(shares)) if len(shares) <= 30 else range(0, len(shares), -(-len(shares) // 30)))
    axes.spines[["top", "right"]].set_visible(False)
    if len(classes) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, ncols=-(-len(classes) // 20))
    figure.savefig(path, dpi=120)
    return path
