"""Readers of each kind of data set, as a `Source` each; nothing is decoded yet.

An extension's is a subclass of `Reader`, named by `data.reader`.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from feddm_flwr.config import ConfigError
from feddm_flwr.config.keys import Data
from feddm_flwr.config.plugins import load_class
from feddm_flwr.data.files import pictures
from feddm_flwr.data.images import ENDINGS, Decoded, Images, decode, fit
from feddm_flwr.data.source import Source

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

_DIGITS_TEST_SHARE = 5  # one digit in five is kept apart from training, as split "test"


class Reader(ABC):
    """Reads a format of the user's own."""

    @abstractmethod
    def open(self, path: Path, data: Data, origin: str, stamp: str) -> Source:
        """Returns what is at a path, which exists, as a source. `origin` says for messages where it is; `stamp` changes
        when a file there does, and is the source's version.

        Raises:
            ConfigError: it cannot be read, or is not what the configuration says. Of a node's own images the message
                leaves the node: no name of a file, and nothing that is in one, may be in it.
        """


def reader_class(name: str) -> type[Reader]:
    """Returns the extension of that name.

    Raises:
        ConfigError: it is no reader.
    """
    return load_class("data.reader", name, Reader)  # type: ignore[type-abstract]


def read_table(data: Data, origin: str, own: bool, stamp: str, table: Dataset) -> Source:
    """Returns a data set that is on this machine's disk."""
    import datasets

    column = data.image_column
    _check_column(column, origin, own, table.column_names)
    table = table.cast_column(column, datasets.Image(decode=False))

    def fill(rows: Sequence[int], out: Images) -> Decoded:
        cells = (row[column] for row in table.select(rows).select_columns([column]))
        return decode(data, map(_file, cells), [f"row {row}" for row in rows], origin, out)

    return Source(origin, table, fill, stamp or table._fingerprint)


def read_stream(data: Data, origin: str, own: bool, stamp: str, name: str, options: dict[str, Any]) -> Source:
    """Returns a data set of which nothing is kept but its classes. Parquet is read by column: these cost little."""
    import datasets
    from huggingface_hub import HfApi

    d = data
    stream = datasets.load_dataset(name, streaming=True, **options)
    names = stream.column_names or [*next(iter(stream))]
    _check_column(d.image_column, origin, own, names)
    images = stream.select_columns([d.image_column]).cast_column(d.image_column, datasets.Image(decode=False))
    labels = [c for c in names if c in (d.label_column, d.natural_column)]
    counted = labels or [c for c in names if c != d.image_column][:1]
    count = 0
    columns: dict[str, list[Any]] = {c: [] for c in labels}
    for row in stream.select_columns(counted) if counted else images:
        count += 1
        for c in labels:
            columns[c].append(row[c])
    kinds = datasets.Features({c: stream.features[c] for c in labels}) if labels and stream.features else None
    table = datasets.Dataset.from_dict(columns or {"row": [*range(count)]}, kinds)

    def fill(chosen: Sequence[int], out: Images) -> Decoded:
        assert [*chosen] == [*range(count)]
        cells = (row[d.image_column] for row in images)
        return decode(d, map(_file, cells), [f"row {row}" for row in chosen], origin, out)

    return Source(origin, table, fill, stamp or str(HfApi().dataset_info(name).sha), streamed=True)


def _file(cell: dict[str, Any] | None) -> bytes | Path | str | None:
    """Returns what a cell of an image column is decoded from."""
    if not cell or not (cell["bytes"] or cell["path"]):
        return None
    return cell["bytes"] or (cell["path"] if "://" in cell["path"] else Path(cell["path"]))


def _check_column(column: str, origin: str, own: bool, names: Sequence[str]) -> None:
    if column not in names:
        if own:
            log.warning("%s: has the columns %s", origin, [*names])  # in the node's own log
        there = "the node's own log says which there are" if own else f"has {[*names]}"
        raise ConfigError(f"data.image-column = {column!r}: no such column; {origin}: {there}")


def read_digits(data: Data, origin: str) -> Source:
    """Reads scikit-learn's 1,797 handwritten digits (UCI ML repository), 8x8 with values 0..16."""
    from datasets import Dataset

    if data.split not in ("train", "test"):
        raise ConfigError(f"data.split = {data.split!r}: must be train or test for digits")
    # Importing it would take longer than all else that an introduction needs.
    where = Path(str(find_spec("sklearn").origin)).parent  # type: ignore[union-attr]
    digits = np.loadtxt(where / "datasets/data/digits.csv.gz", np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(digits))
    test = len(order) // _DIGITS_TEST_SHARE
    rows = order[test:] if data.split == "train" else order[:test]
    images = np.round(digits[rows, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    table = Dataset.from_dict({"label": digits[rows, -1].astype(np.int64)})

    def fill(chosen: Sequence[int], out: Images) -> Decoded:
        for i, row in enumerate(chosen):
            out[i] = fit(data, Image.fromarray(images[row]))
        count = len(chosen)
        return Decoded([*range(count)], {}, Counter({(8, 8): count}), Counter({"L": count}))

    return Source(origin, table, fill, "scikit-learn")


def read_folder(data: Data, path: Path, origin: str, own: bool, stamp: str) -> Source:
    """Returns images below a folder; the class is the name of the first subfolder, where there is one."""
    from datasets import Dataset

    files = sorted(_once(p for p in pictures(path) if p.is_file()))
    if not files:
        raise ConfigError(f"{origin}: no images below this folder; known endings are {' '.join(ENDINGS)}")
    parts = [p.relative_to(path).parts for p in files]
    columns: dict[str, list[str]] = {"file": [_text(str(Path(*part))) for part in parts]}
    if all(len(part) > 1 for part in parts):
        columns[data.label_column] = [_text(part[0]) for part in parts]

    def fill(rows: Sequence[int], out: Images) -> Decoded:
        names = [f"file {i + 1} in order of name" if own else columns["file"][i] for i in rows]
        return decode(data, (files[i] for i in rows), names, origin, out)

    return Source(origin, Dataset.from_dict(columns), fill, stamp, names=tuple(columns["file"]))


def _once(files: Iterable[Path]) -> Iterator[Path]:
    """Yields files without links to files that are there as well."""
    links, seen = list[Path](), set[str]()
    for file in files:
        if file.is_symlink():
            links.append(file)
        else:
            seen.add(os.path.realpath(file))
            yield file
    for file in links:
        if (target := os.path.realpath(file)) not in seen:
            seen.add(target)
            yield file


def _text(name: str) -> str:
    """Returns a file's name as text, though it be of another encoding than the system's."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
