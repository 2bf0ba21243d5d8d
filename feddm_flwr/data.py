"""A node's images: read, shared out among simulated nodes, decoded to one uint8 array.

Resize rule, the same everywhere: EXIF orientation applied, converted to grey or RGB, the shorter
side resized to `data.image-size` with Pillow's antialiased bicubic filter, centre-cropped to square.
"""

from __future__ import annotations

import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from feddm_flwr.config import ConfigError, RunConfig, derive_seed, parse

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

Images = NDArray[np.uint8]  # (N, C, H, W)

log = logging.getLogger("feddm")

_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_DIGITS_TEST_SHARE = 5  # one digit in five is kept apart from training, as split "test"


@dataclass(frozen=True)
class NodeData:
    """The images of one node, uint8 (N, C, H, W), and how many it has of each class."""

    train: Images
    held_out: Images
    class_counts: dict[str, int]
    skipped: int = 0  # images that cannot be read


@dataclass(frozen=True)
class _Source:
    """A data set before decoding: where it is (for messages), one row per image, and a decoder of rows, which
    also says which of them could be read."""

    origin: str
    table: Dataset
    decode: Callable[[Sequence[int]], tuple[Images, list[int]]]

    def classes(self, column: str) -> list[str]:
        """The class of every row, or nothing where there is no such column."""
        if column not in self.table.column_names:
            return []
        feature = self.table.features[column]
        values = self.table[column][:]
        return [feature.int2str(v) if hasattr(feature, "int2str") else str(v) for v in values]


def load_node(config: RunConfig, partition: tuple[int, int] | None, data_path: str | None) -> NodeData:
    """The data of one node: all of `data_path`, or partition i of n of `data.name`.

    Cached, since a node comes back to the same process every round, by what the images depend on: other runs
    share them, and a folder to which images were added, or from which some were taken, is read anew.

    Raises:
        ConfigError: a key does not fit the data, or images cannot be read.
    """
    essence = replace(parse({}), data=config.data, seed=config.seed)
    return _load_node(essence, partition, data_path, _stamp(data_path))


def _stamp(data_path: str | None) -> int:
    """When a folder, or a class in it, or a file last changed."""
    path = Path(data_path).expanduser() if data_path else None
    if not path or not path.exists():
        return 0
    below = [one for one in path.iterdir() if one.is_dir()] if path.is_dir() else []
    return max(one.stat().st_mtime_ns for one in (path, *below))


@lru_cache(maxsize=8)
def _load_node(config: RunConfig, partition: tuple[int, int] | None, data_path: str | None, stamp: int) -> NodeData:
    if data_path:
        if config.data.name == "digits":  # the default, whose size and channels would go unnoticed
            raise ConfigError(
                "data.name = 'digits' but this node has a data-path: set data.name to what the federation's images "
                "are called, data.image-size and data.channels"
            )
        source = _open(config, data_path, f"data-path = {data_path!r}", own=True)
        rows = list(range(len(source.table)))
    elif partition:
        source = _open(config, config.data.name, f"data.name = {config.data.name!r}")
        rows = _partition(config, source, *partition)
    else:
        raise ConfigError("the node has neither data-path nor partition-id and num-partitions in its --node-config")
    order = np.random.default_rng(derive_seed(config.seed, "held out", partition)).permutation(len(rows))
    asked = len(rows)
    images, rows = source.decode([rows[i] for i in order])
    share = config.data.eval_fraction
    held_out = min(math.ceil(share * len(rows)), len(rows) - 1)
    if len(rows) < (2 if share else 1):
        raise ConfigError(
            f"{source.origin}: {len(rows)} images are too few; at least one is needed to train on, "
            "and one to hold out where data.eval-fraction is above 0"
        )
    classes = source.classes(config.data.label_column)
    return NodeData(
        train=images[held_out:],
        held_out=images[:held_out],
        class_counts=dict(sorted(Counter(classes[i] for i in rows).items())) if classes else {},
        skipped=asked - len(rows),
    )


def load_all(config: RunConfig) -> tuple[Images, list[str]]:
    """Every image of `data.name` and its class (empty where unknown): for evaluation and benchmarks.

    Raises:
        ConfigError: as `load_node`.
    """
    source = _open(config, config.data.name, f"data.name = {config.data.name!r}")
    images, rows = source.decode(range(len(source.table)))
    classes = source.classes(config.data.label_column)
    return images, [classes[i] for i in rows] if classes else []


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
def _open(config: RunConfig, name: str, origin: str, own: bool = False) -> _Source:
    """A data set by name or path, nothing decoded yet. A node's `own` must be here: no name is looked
    up elsewhere, and no file's name goes into a message."""
    import datasets

    if name == "digits" and not own:
        return _digits(config, origin)
    path = Path(name).expanduser()
    if path.is_dir() and not sorted(path.glob("*.parquet")):
        return _folder(config, path, origin, own)
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

    def decode(rows: Sequence[int]) -> tuple[Images, list[int]]:
        cells = table.select(rows)[column]
        files = [cell and (cell["bytes"] or Path(cell["path"])) for cell in cells]
        return _decode(config, rows, files, [f"row {row}" for row in rows], origin)

    return _Source(origin, table, decode)


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

    def decode(chosen: Sequence[int]) -> tuple[Images, list[int]]:
        return np.stack([_fit(config, Image.fromarray(images[i])) for i in chosen]), [*chosen]

    return _Source(origin, table, decode)


def _folder(config: RunConfig, path: Path, origin: str, own: bool) -> _Source:
    """Images below a folder; the class is the name of the first subfolder, where there is one."""
    from datasets import Dataset

    files = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in _ENDINGS and p.is_file())
    if not files:
        raise ConfigError(f"{origin}: no images below this folder; known endings are {' '.join(_ENDINGS)}")
    parts = [p.relative_to(path).parts for p in files]
    columns: dict[str, list[str]] = {"file": [str(Path(*part)) for part in parts]}
    if all(len(part) > 1 for part in parts):
        columns[config.data.label_column] = [part[0] for part in parts]

    def decode(rows: Sequence[int]) -> tuple[Images, list[int]]:
        names = [f"file {i + 1} in order of name" if own else columns["file"][i] for i in rows]
        return _decode(config, rows, [files[i] for i in rows], names, origin)

    return _Source(origin, Dataset.from_dict(columns), decode)


def _decode(
    config: RunConfig, rows: Sequence[int], files: Sequence[bytes | Path | None], names: Sequence[str], origin: str
) -> tuple[Images, list[int]]:
    """Decode image files; also the rows of those that can be read.

    Raises:
        ConfigError: more cannot be read than `data.max-broken` allows; the message counts them and names the first.
    """
    images: list[Images] = []
    kept: list[int] = []
    broken: list[str] = []
    for row, file, name in zip(rows, files, names, strict=True):
        try:
            if file is None:
                raise ValueError("no image")
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                images.append(_fit(config, image))
            kept.append(row)
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            log.warning("%s: %s cannot be read: %s", origin, file if isinstance(file, Path) else name, error)
            broken.append(f"{name} ({type(error).__name__})")
    if len(broken) > config.data.max_broken * len(names):
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ConfigError(
            f"{origin}: {len(broken)} of {len(names)} images cannot be read: {', '.join(broken[:3])}{more}; "
            f"repair or remove them (the node's own log has every name and cause), or raise data.max-broken = "
            f"{config.data.max_broken:g}, the share that is skipped"
        )
    return np.stack(images), kept


def _fit(config: RunConfig, image: Image.Image) -> Images:
    """One image as uint8 (C, H, W), by the rule at the head of this file."""
    size = config.data.image_size
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}: more than 8 bits for a channel are not supported")
    image = ImageOps.exif_transpose(image).convert("L" if config.data.channels == 1 else "RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    pixels: Images = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
