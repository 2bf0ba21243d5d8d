"""A node's images: found, shared out among simulated nodes, decoded once to a uint8 array on its disk."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from feddm_flwr.array_cache import array, cached, facts, new_array, write_facts
from feddm_flwr.config import ConfigError, RunConfig, derive_seed, parse
from feddm_flwr.images import ENDINGS, Images, decode, fit

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

Labels = NDArray[np.int64]  # (N,)

_DIGITS_TEST_SHARE = 5  # one digit in five is kept apart from training, as split "test"
_FORMAT = 1  # of what is cached: raised when the same file would be decoded to other pixels


@dataclass(frozen=True)
class NodeData:
    """The images of one node, uint8 (N, C, H, W), and how many it has of each class."""

    train: Images
    held_out: Images
    class_counts: dict[str, int]
    train_labels: Labels  # places in `data.classes`; zeros where that is empty
    held_out_labels: Labels
    skipped: int = 0  # images that cannot be read
    fingerprint: str = ""  # of the images and their order; empty where they are not cached


@dataclass(frozen=True)
class _Source:
    """A data set before decoding: where it is (for messages), one row per image, and a decoder of rows, which
    fills the beginning of an array and says which of them could be read."""

    origin: str
    table: Dataset
    decode: Callable[[Sequence[int], Images], list[int]]

    version: str  # of what it is decoded from

    def classes(self, column: str) -> list[str]:
        """The class of every row, or nothing where there is no such column."""
        if column not in self.table.column_names:
            return []
        feature = self.table.features[column]
        values = self.table[column][:]
        return [feature.int2str(v) if hasattr(feature, "int2str") else str(v) for v in values]


def load_node(config: RunConfig, partition: tuple[int, int] | None, data_path: str | None, root: Path) -> NodeData:
    """The data of one node: all of `data_path`, or partition i of n of `data.name`; decoded once into a cache
    below `root`, which every run and process with the same data shares.

    Raises:
        ConfigError: a key does not fit the data, images cannot be read, or the cache cannot be written.
    """
    if data_path and config.data.name == "digits":  # the default, whose size and channels would go unnoticed
        raise ConfigError(
            "data.name = 'digits' but this node has a data-path: set data.name to what the federation's images "
            "are called, data.image-size and data.channels"
        )
    if not data_path and not partition:
        raise ConfigError("the node has neither data-path nor partition-id and num-partitions in its --node-config")
    data = config.data if not data_path else replace(config.data, name="own")
    essence = replace(parse({}), data=data, seed=config.seed)
    return _load_node(essence, partition, data_path, _stamp(data_path or config.data.name), root)


def _stamp(name: str) -> str:
    """What changes when a file does that is there by this name, or below it; "" where there is none."""
    path = Path(name).expanduser()
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for folder, folders, files in [*os.walk(path)] if path.is_dir() else [(str(path.parent), [], [path.name])]:
        folders.sort()
        for file in sorted(files):
            try:
                found = Path(folder, file).stat()
            except OSError:  # a link to nothing
                continue
            digest.update(f"{folder}/{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _load_node(
    config: RunConfig, partition: tuple[int, int] | None, data_path: str | None, stamp: str, root: Path
) -> NodeData:
    """`stamp` tells the files' states apart."""
    d, name = config.data, data_path or config.data.name
    origin = f"data-path = {data_path!r}" if data_path else f"data.name = {name!r}"
    # What a hub has under a name may change: the library knows.
    version = stamp or _open(config, name, origin, own=bool(data_path), stamp=stamp).version
    key = {
        "format": _FORMAT,
        "data": asdict(replace(d, classes="", eval_fraction=0)),
        "seed": config.seed,
        "partition": partition,
        "version": version,
    }

    def fill(folder: Path) -> None:
        source = _open(config, name, origin, own=bool(data_path), stamp=stamp)
        rows = _partition(config, source, *partition) if partition and not data_path else [*range(len(source.table))]
        order = np.random.default_rng(derive_seed(config.seed, "held out", partition)).permutation(len(rows))
        rows = [rows[i] for i in order]
        images = new_array(folder, "images", (len(rows), d.channels, d.image_size, d.image_size), np.uint8)
        kept = source.decode(rows, images)
        classes = source.classes(d.label_column)
        own = [classes[row] for row in kept] if classes else []
        write_facts(folder, {"classes": own, "count": len(kept), "asked": len(rows)})

    try:
        folder = cached(root, key, fill)
    except OSError as error:
        raise ConfigError(f"state-path = {str(root)!r}: decoded images cannot be kept there ({error})") from error
    found = facts(folder)
    own, count, share = found["classes"], found["count"], d.eval_fraction
    held_out = min(math.ceil(share * count), count - 1)
    if count < (2 if share else 1):
        raise ConfigError(
            f"{origin}: {count} images are too few; at least one is needed to train on, "
            "and one to hold out where data.eval-fraction is above 0"
        )
    images, labels = array(folder, "images")[:count], _labels(config, own, count, origin)
    return NodeData(
        train=images[held_out:],
        held_out=images[:held_out],
        train_labels=labels[held_out:],
        held_out_labels=labels[:held_out],
        class_counts=dict(sorted(Counter(own).items())),
        skipped=found["asked"] - count,
        fingerprint=folder.name,
    )


def _labels(config: RunConfig, own: list[str], count: int, origin: str) -> Labels:
    names = {name: i for i, name in enumerate(config.data.class_names)}
    if not names:
        return np.zeros(count, np.int64)
    if not own:
        column = config.data.label_column
        raise ConfigError(f"data.label-column = {column!r}: no such column, nor class folders; {origin} has no classes")
    if unknown := sorted({*own} - {*names}):
        raise ConfigError(
            f"data.classes = {config.data.classes!r}: must name every class; {origin} also has "
            f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}"
        )
    return np.array([names[name] for name in own], np.int64)


def load_all(config: RunConfig) -> tuple[Images, list[str]]:
    """Every image of `data.name` and its class (empty where unknown): for evaluation and benchmarks.

    Raises:
        ConfigError: as `load_node`.
    """
    name, d = config.data.name, config.data
    source = _open(config, name, f"data.name = {name!r}", stamp=_stamp(name))
    images = np.empty((len(source.table), d.channels, d.image_size, d.image_size), np.uint8)
    kept = source.decode(range(len(images)), images)
    classes = source.classes(config.data.label_column)
    return images[: len(kept)], [classes[i] for i in kept] if classes else []


def _partition(config: RunConfig, source: _Source, index: int, count: int) -> list[int]:
    """The rows of partition `index` of `count`, through flwr-datasets' partitioners."""
    from datasets import Dataset
    from flwr_datasets import partitioner as flower

    d = config.data
    seed = derive_seed(config.seed, "partition") % 2**32
    makers: dict[str, tuple[str, Callable[[], Partitioner]]] = {
        "iid": ("", lambda: flower.IidPartitioner(count)),
        "dirichlet": (
            d.label_column,
            lambda: flower.DirichletPartitioner(count, "by", d.alpha, min_partition_size=2, seed=seed),
        ),
        "pathological": (
            d.label_column,
            lambda: flower.PathologicalPartitioner(count, "by", d.classes_per_node, "first-deterministic", seed=seed),
        ),
        "shard": (
            d.label_column,
            lambda: flower.ShardPartitioner(count, "by", num_shards_per_partition=d.shards_per_node, seed=seed),
        ),
        "natural": (d.natural_column, lambda: flower.NaturalIdPartitioner("by")),
    }
    column, make = makers[d.partition]
    rows = len(source.table)
    problem = f"data.partition = {d.partition!r} for {count} nodes and {rows} images ({source.origin})"
    if count > rows:
        raise ConfigError(f"{problem}: more partitions than images; use at most {rows} nodes")
    if column and column not in source.table.column_names:
        key = "data.natural-column" if d.partition == "natural" else "data.label-column"
        there = source.table.column_names
        hint = "; subfolders would be the classes" if there == ["file"] else ""
        raise ConfigError(f"{key} = {column!r}: no such column; {source.origin} has {there}{hint}")
    # The partitioners see the label alone, in shuffled order: nothing is decoded for other nodes.
    order = np.random.default_rng(seed).permutation(rows)
    columns: dict[str, Any] = {"row": order}
    if column:
        values = source.table[column][:]
        columns["by"] = [values[i] for i in order]
    partitions = make()
    partitions.dataset = Dataset.from_dict(columns)
    try:
        if d.partition == "natural" and partitions.num_partitions != count:
            raise ValueError(f"{column!r} has {partitions.num_partitions} different values; use as many nodes")
        chosen: list[int] = partitions.load_partition(index)["row"][:]
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{problem}: {error}") from error
    return chosen


@lru_cache(maxsize=2)
def _open(config: RunConfig, name: str, origin: str, *, own: bool = False, stamp: str) -> _Source:
    """A data set by name or path, nothing decoded yet. A node's `own` must be here: no name is looked
    up elsewhere, and no file's name goes into a message."""
    import datasets

    if name == "digits" and not own:
        return _digits(config, origin)
    path = Path(name).expanduser()
    if path.is_dir() and not sorted(path.glob("*.parquet")):
        return _folder(config, path, origin, own, stamp)
    if not path.exists() and (own or path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".parquet"):
        raise ConfigError(f"{origin}: no such file or folder")
    column = config.data.image_column
    try:
        if path.exists():
            files = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else [str(path)]
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            table = datasets.load_dataset(name, split=config.data.split)
        if column in table.column_names:
            table = table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # the library raises many kinds for many causes
        raise ConfigError(
            f"{origin}: cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]}); must be digits, "
            f"a Hugging Face data set id in reach, a folder of images, or parquet with images in column {column!r}"
        ) from error
    if column not in table.column_names:
        raise ConfigError(f"data.image-column = {column!r}: no such column; {origin} has {table.column_names}")

    def read(rows: Sequence[int]) -> Iterable[bytes | Path | None]:
        for cell in table.select(rows).select_columns([column]):
            image = cell[column]
            yield image and (image["bytes"] or Path(image["path"]))

    def fill(rows: Sequence[int], out: Images) -> list[int]:
        return [rows[i] for i in decode(config.data, read(rows), [f"row {row}" for row in rows], origin, out)]

    return _Source(origin, table, fill, stamp or table._fingerprint)


def _digits(config: RunConfig, origin: str) -> _Source:
    """scikit-learn's 1,797 handwritten digits (UCI ML repository), 8x8 with values 0..16."""
    from datasets import Dataset
    from sklearn.datasets import load_digits

    if config.data.split not in ("train", "test"):
        raise ConfigError(f"data.split = {config.data.split!r}: must be train or test for digits")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    test = len(order) // _DIGITS_TEST_SHARE
    rows = order[test:] if config.data.split == "train" else order[:test]
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    table = Dataset.from_dict({"label": digits.target[rows]})

    def fill(chosen: Sequence[int], out: Images) -> list[int]:
        for i, row in enumerate(chosen):
            out[i] = fit(config.data, Image.fromarray(images[row]))
        return [*chosen]

    return _Source(origin, table, fill, "scikit-learn")


def _folder(config: RunConfig, path: Path, origin: str, own: bool, stamp: str) -> _Source:
    """Images below a folder; the class is the name of the first subfolder, where there is one."""
    from datasets import Dataset

    files = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not files:
        raise ConfigError(f"{origin}: no images below this folder; known endings are {' '.join(ENDINGS)}")
    parts = [p.relative_to(path).parts for p in files]
    columns: dict[str, list[str]] = {"file": [str(Path(*part)) for part in parts]}
    if all(len(part) > 1 for part in parts):
        columns[config.data.label_column] = [part[0] for part in parts]

    def fill(rows: Sequence[int], out: Images) -> list[int]:
        names = [f"file {i + 1} in order of name" if own else columns["file"][i] for i in rows]
        return [rows[i] for i in decode(config.data, (files[i] for i in rows), names, origin, out)]

    return _Source(origin, Dataset.from_dict(columns), fill, stamp)
