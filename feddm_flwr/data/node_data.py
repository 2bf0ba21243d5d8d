"""A node's images: shared out among simulated nodes, decoded once to a uint8 array on its disk."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddm_flwr.config import ConfigError, derive_seed, may_be_told
from feddm_flwr.config.data import Data
from feddm_flwr.data.files import stamp_of
from feddm_flwr.data.images import Decoded, Images
from feddm_flwr.data.partition import partition_rows
from feddm_flwr.data.remarks import remarks_on
from feddm_flwr.data.source import Source
from feddm_flwr.data.sources import open_named, open_own, open_source
from feddm_flwr.storage.array_cache import array, cached, facts, new_array, write_facts

log = logging.getLogger(__name__)

Labels = NDArray[np.int64]  # (N,)

_TOO_MANY = "classes, too many to count one by one (see data.label-column)"
_FORMAT = 5  # of what is cached: raised when the same file would be decoded to other pixels


@dataclass(frozen=True)
class NodeData:
    """The images of one node, uint8 (N, C, H, W), and how many it has of each class."""

    train: Images
    held_out: Images
    class_counts: dict[str, int]
    classes: list[str]  # of the held-out images, then of those to train on; empty where unknown, or not to be told
    train_labels: Labels  # places in `data.classes`; zeros where that is empty
    held_out_labels: Labels
    skipped: int = 0  # images that cannot be read
    sizes: str = ""  # the smallest and the largest, before they were resized
    remarks: Mapping[str, int] = field(default_factory=dict)  # see `data.remarks`
    fingerprint: str = ""  # of the images and their order; empty where they are not cached
    groups: tuple[int, ...] = ()  # how many images each group has that is trained on, in their order; empty: none has

    @property
    def records(self) -> int:
        """How many groups there are to train on, or images where none belong together."""
        return len(self.groups) or len(self.train)


def load_node(data: Data, seed: int, partition: tuple[int, int] | None, data_path: str | None, root: Path) -> NodeData:
    """Returns the data of one node: all of `data_path`, or partition i of n of `data.name` by the `seed`; decoded once
    into a cache below `root`, which every run and process with the same data shares.

    Raises:
        ConfigError: a key does not fit the data, images cannot be read, or the cache cannot be written.
    """
    if data_path and data.name == "digits":  # the default, whose size and channels would go unnoticed
        raise ConfigError(
            "data.name = 'digits' but this node has a data-path: set data.name to what the federation's images "
            "are called, data.image-size and data.channels"
        )
    if not data_path and not partition:
        raise ConfigError("the node has neither data-path nor partition-id and num-partitions in its --node-config")
    origin = f"data-path = {data_path!r}" if data_path else f"data.name = {data.name!r}"
    stamp = stamp_of(data_path or data.name, origin, every=data.reader != "auto")
    if data_path:
        return _load_own(replace(data, name="own"), seed, None, data_path, origin, stamp, root)
    return _load_node(data, seed, partition, None, origin, stamp, root)


@lru_cache(maxsize=1024)  # a process has several simulated nodes
def _load_node(
    d: Data,
    seed: int,
    partition: tuple[int, int] | None,
    data_path: str | None,
    origin: str,
    stamp: str,
    root: Path,
) -> NodeData:
    """Does as `load_node`; `stamp` tells the files' states apart."""
    name = data_path or d.name

    def open_here(scratch: Path) -> Source:
        if data_path:
            return open_own(d, data_path, origin, stamp=stamp, scratch=scratch)
        return open_source(d, name, origin, stamp=stamp)

    # What a hub has under a name may change: the library knows.
    version = stamp or open_here(root).version
    key = {
        "format": _FORMAT,
        "data": _essence(d),
        "seed": seed,
        "partition": partition,
        "place": name,
    }
    if d.group_column and partition:
        key["dealt"] = "whole groups"

    def fill(folder: Path) -> None:
        source = open_here(scratch := folder / "scratch")
        if source.streamed:
            source = _kept(d, source, name, root)
        rows = partition_rows(d, seed, source, *partition) if partition else [*range(len(source.table))]
        # By name, or by row: what is held out stays so when images are added or removed.
        names = source.names or range(len(source.table))
        groups = source.groups(d.group_column)
        if source.together:  # those of a file stay beside each other: it is read once
            rows = sorted(rows)
        else:
            rows = sorted(rows, key=lambda row: derive_seed(seed, "held out", partition, names[row]))
        if groups:  # which stay together, by the same rule
            rows = sorted(rows, key=lambda row: (derive_seed(seed, "held out", groups[row]), groups[row]))
        images = new_array(folder, "images", (len(rows), d.channels, d.image_size, d.image_size), np.uint8)
        decoded = source.decode(rows, images)
        classes = _classes(source, d.label_column)
        own = [classes[rows[i]] for i in decoded.kept] if classes else []
        count = len(decoded.kept)
        remarks = remarks_on(source, decoded, images[:count], whole=not partition or partition[0] == 0)
        about = {"asked": len(rows), "sizes": decoded.extent(), "remarks": remarks}
        about |= {"version": source.version} if source.by_path and source.version != version else {}
        if groups:  # of a group, nothing is written but how many images it has
            about["groups"] = [len([*same]) for _, same in groupby(groups[rows[i]] for i in decoded.kept)]
        write_facts(folder, {"classes": own, "count": count, **about})
        shutil.rmtree(scratch, ignore_errors=True)

    try:
        folder = cached(root, key, version, fill)
        if before := facts(folder).get("version"):  # a table of paths stays as it is when an image changes
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                now = open_here(Path(scratch)).version
            folder = folder if now == before else cached(root, key, now, fill)
        found, kept = facts(folder), array(folder, "images")
    except OSError as error:
        raise ConfigError(
            f"state-path = {str(root)!r}: decoded images cannot be kept there ({error.strerror})"
        ) from error
    return _divided(d, found, kept, origin, folder.name, own=data_path is not None)


#: A process has one node's own images, which may be others each round: the earlier ones' disk is free then.
_load_own = lru_cache(maxsize=1)(_load_node.__wrapped__)


def _divided(d: Data, found: Mapping[str, Any], kept: Images, origin: str, fingerprint: str, *, own: bool) -> NodeData:
    """Returns decoded images, of which the facts were `found`, as what is held out and what is trained on; `own`:
    whether they are a node's own.

    Raises:
        ConfigError: they are too few, or their classes are others than the configuration names.
    """
    count, share = found["count"], d.eval_fraction
    # Of a node's own images, names that the run does not ask for are nobody's business: they may be patients'.
    classes = found["classes"] if not own or d.class_names else []
    held_out = min(math.ceil(share * count), count - 1)
    if count < (2 if share else 1):
        raise ConfigError(
            f"{origin}: {count} images are too few; at least one is needed to train on, "
            "and one to hold out where data.eval-fraction is above 0"
        )
    groups = tuple(found.get("groups", ()))
    if groups:
        ends = [*accumulate(groups)]
        whole = next(i for i, end in enumerate(ends, 1) if end >= held_out) if share else 0
        if whole >= len(groups):
            what = f"data.group-column = {d.group_column!r}: {origin} has {len(groups)} groups"
            if not d.group_column:
                what = f"{origin}: has {len(groups)} files with several images, which stay together"
            raise ConfigError(f"{what}; too few to hold some out, and train on others, with data.eval-fraction above 0")
        held_out, groups = ends[whole - 1] if whole else 0, groups[whole:]
    images, labels = kept[:count], _labels(d, classes, count, origin, own)
    counts, remarks = dict(sorted(Counter(classes).items())), dict(found["remarks"])
    if not d.class_names and not may_be_told(counts):
        remarks[_TOO_MANY] = len(counts)
        classes, counts = [], {}
    return NodeData(
        train=images[held_out:],
        held_out=images[:held_out],
        train_labels=labels[held_out:],
        held_out_labels=labels[:held_out],
        class_counts=counts,
        classes=classes,
        skipped=found["asked"] - count,
        sizes=found["sizes"],
        remarks=remarks,
        fingerprint=fingerprint,
        groups=groups,
    )


def _labels(d: Data, own: list[str], count: int, origin: str, secret: bool) -> Labels:
    names = {name: i for i, name in enumerate(d.class_names)}
    if not names:
        return np.zeros(count, np.int64)
    if not own:
        column = d.label_column
        raise ConfigError(f"data.label-column = {column!r}: no such column, nor class folders; {origin} has no classes")
    if unknown := sorted({*own} - {*names}):
        others = f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}"
        if secret:
            log.warning("%s also has the classes %s", origin, others)
            others = f"{len(unknown)} more, which the node's own log names"
        raise ConfigError(f"data.classes = {d.classes!r}: must name every class; {origin} also has {others}")
    return np.array([names[name] for name in own], np.int64)


def load_all(d: Data) -> tuple[Images, list[str], Decoded]:
    """Returns every image of `data.name`, its class (empty where unknown), and what was found on the way.

    Raises:
        ConfigError: as `load_node`.
    """
    source = open_named(d)
    images = np.empty((len(source.table), d.channels, d.image_size, d.image_size), np.uint8)
    decoded = source.decode(range(len(images)), images)
    classes = source.classes(d.label_column)
    return images[: len(decoded.kept)], [classes[i] for i in decoded.kept] if classes else [], decoded


def partitions(d: Data, seed: int, count: int) -> list[dict[str, int]]:
    """Returns how many images of each class (of class "" where unknown) each node of a simulation would have.

    Raises:
        ConfigError: as `load_node`.
    """
    source = open_named(d)
    classes = source.classes(d.label_column) or [""] * len(source.table)
    return [dict(Counter(classes[row] for row in partition_rows(d, seed, source, i, count))) for i in range(count)]


def _essence(d: Data) -> dict[str, object]:
    """Returns what of the keys decides what is decoded; a key that came later is not in it at its default, so that what
    was cached before stays of use."""
    found = asdict(replace(d, classes="", eval_fraction=0))
    later = {"reader": "auto", "subset": "", "group_column": "", "window_center": 0.0, "window_width": 0.0}
    later |= {"pages": "first", "slice_axis": "axial", "slice_content": 0.05}
    return {key: value for key, value in found.items() if later.get(key) != value}


@lru_cache(maxsize=1)
def _classes(source: Source, column: str) -> list[str]:
    return source.classes(column)


@lru_cache(maxsize=1)  # so that the nodes of a simulation have one source
def _kept(d: Data, source: Source, name: str, root: Path) -> Source:
    """Returns a stream's images as a source that has them on its disk, decoded; every node of a machine shares them."""
    shape = (len(source.table), d.channels, d.image_size, d.image_size)
    chosen = (name, d.split, d.image_column, d.black, d.white, d.max_broken, *filter(None, [d.subset]))

    def fill(folder: Path) -> None:
        decoded = source.decode(range(shape[0]), new_array(folder, "images", shape, np.uint8))
        sizes = [[*size, n] for size, n in decoded.sizes.items()]
        write_facts(folder, {"kept": decoded.kept, "sizes": sizes, "pages": decoded.pages})

    folder = cached(root, {"format": _FORMAT, "stream": chosen}, f"{source.version} {shape}", fill)
    found, images = facts(folder), array(folder, "images")
    place = {row: i for i, row in enumerate(found["kept"])}

    def copy(rows: Sequence[int], out: Images) -> Decoded:
        sizes = Counter({(width, height): n for width, height, n in found["sizes"]})
        decoded = Decoded([i for i, row in enumerate(rows) if row in place], {}, sizes, pages=found["pages"])
        for to, i in enumerate(decoded.kept):
            out[to] = images[place[rows[i]]]
        return decoded

    return replace(source, fill=copy)
