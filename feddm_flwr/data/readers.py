"""Readers of each kind of data set, as a `Source` each; nothing is decoded yet.

An extension's is a subclass of `Reader`, named by `data.reader`.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feddm_flwr.config import ConfigError
from feddm_flwr.config.data import Data
from feddm_flwr.config.plugins import load_class
from feddm_flwr.data.cells import file_of, holds_images, holds_lists, is_path, pixels_of, stamp_of_paths
from feddm_flwr.data.formats import all_contents
from feddm_flwr.data.images import Decoded, Images, decode, fit
from feddm_flwr.data.source import PATIENT, Source
from feddm_flwr.data.splits import ALL, no_such_split, split_of

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


def read_table(data: Data, origin: str, own: bool, stamp: str, table: Dataset, folders: Sequence[Path] = ()) -> Source:
    """Returns a data set that is on this machine's disk. Paths in it start at the first of the `folders` that has such
    a file, else at the working folder."""
    import datasets

    column = data.image_column
    _check_columns(data, origin, own, table.features)
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    pixels = pixels_of(data, table)
    by_path = len(table) > 0 and is_path(table[0][column])

    def fill(rows: Sequence[int], out: Images) -> Decoded:
        cells = (row[column] for row in table.select(rows).select_columns([column]))
        files = (file_of(cell, folders, pixels) for cell in cells)
        return decode(data, files, [f"row {row}" for row in rows], origin, out)

    return Source(
        origin,
        table,
        fill,
        (stamp or table._fingerprint) + (stamp_of_paths(table[column], folders) if by_path else ""),
        by_path=by_path,
        other_columns=_other_images(table.features, column),
    )


def read_stream(
    data: Data,
    origin: str,
    own: bool,
    stamp: str,
    name: str,
    options: dict[str, Any],
    folders: Sequence[Path] = (),
) -> Source:
    """Returns a data set of which nothing is kept but its classes. Parquet is read by column: these cost little."""
    import datasets
    from huggingface_hub import HfApi

    d = data
    stream = datasets.load_dataset(name, streaming=True, **options)
    features = stream.features or dict.fromkeys(stream.column_names or [*next(iter(stream))])
    _check_columns(d, origin, own, features)
    images = stream.select_columns([d.image_column])
    if not stream.features or isinstance(features[d.image_column], datasets.Image):
        images = images.cast_column(d.image_column, datasets.Image(decode=False))
    labels = [c for c in features if c in (d.label_column, d.natural_column, d.group_column)]
    counted = labels or [c for c in features if c != d.image_column][:1]
    count = 0
    columns: dict[str, list[Any]] = {c: [] for c in labels}
    for row in stream.select_columns(counted) if counted else images:
        count += 1
        for c in labels:
            columns[c].append(row[c])
    kinds = datasets.Features({c: features[c] for c in labels}) if labels and stream.features else None
    table = datasets.Dataset.from_dict(columns or {"row": [*range(count)]}, kinds)
    pixels = pixels_of(d, images)
    by_path = count > 0 and is_path(next(iter(images))[d.image_column])
    paths = stamp_of_paths((row[d.image_column] for row in images), folders) if by_path else ""

    def fill(chosen: Sequence[int], out: Images) -> Decoded:
        assert [*chosen] == [*range(count)]
        files = (file_of(row[d.image_column], folders, pixels) for row in images)
        return decode(d, files, [f"row {row}" for row in chosen], origin, out)

    return Source(
        origin,
        table,
        fill,
        (stamp or str(HfApi().dataset_info(name).sha)) + paths,
        streamed=True,
        by_path=by_path,
        other_columns=_other_images(features, d.image_column),
    )


def _check_columns(data: Data, origin: str, own: bool, features: Mapping[str, Any]) -> None:
    """Finds out whether the columns that the configuration names can be what it takes them for.

    Raises:
        ConfigError: there is no column of images, or one of classes has several in a cell.
    """
    column = data.image_column
    if column not in features:
        if own:
            log.warning("%s: has the columns %s", origin, [*features])  # in the node's own log
        there = "the node's own log says which there are" if own else f"has {[*features]}"
        raise ConfigError(f"data.image-column = {column!r}: no such column; {origin}: {there}")
    kind = features[column]
    if kind is not None and not (holds_images(kind) or holds_lists(kind) or _is_text(kind)):
        what = getattr(kind, "dtype", "") or type(kind).__name__
        raise ConfigError(
            f"data.image-column = {column!r}: {origin} holds {what} there; must "
            "hold images: files, their paths or base64 text, or pixels"
        )
    for key, name in (
        ("data.label-column", data.label_column),
        ("data.natural-column", data.natural_column),
        ("data.group-column", data.group_column),
    ):
        if name and holds_lists(features.get(name)):
            raise ConfigError(
                f"{key} = {name!r}: {origin} has lists in this column, several values for an image; name a column that "
                "has one for each, or '' where no classes are needed"
            )


def _is_text(kind: object) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string") or type(kind).__name__ == "Json"


def _other_images(features: Mapping[str, Any], column: str) -> tuple[str, ...]:
    return tuple(name for name, kind in features.items() if name != column and holds_images(kind))


def read_digits(data: Data, origin: str) -> Source:
    """Reads scikit-learn's 1,797 handwritten digits (UCI ML repository), 8x8 with values 0..16."""
    from datasets import Dataset

    if (split := data.split if data.split == ALL else split_of(data.split)) not in ("train", "test", ALL):
        raise no_such_split(data.split, origin, ("train", "test"))
    # Importing it would take longer than all else that an introduction needs.
    where = Path(str(find_spec("sklearn").origin)).parent  # type: ignore[union-attr]
    digits = np.loadtxt(where / "datasets/data/digits.csv.gz", np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(digits))
    test = len(order) // _DIGITS_TEST_SHARE
    rows = {"train": order[test:], "test": order[:test], ALL: order}[split]
    images = np.round(digits[rows, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    table = Dataset.from_dict({"label": digits[rows, -1].astype(np.int64)})

    def fill(chosen: Sequence[int], out: Images) -> Decoded:
        found = Decoded()
        for place, row in enumerate(chosen):
            found.take(place, fit(data, images[row]), out)
        return found

    return Source(origin, table, fill, "scikit-learn")


def read_folder(
    data: Data, path: Path, origin: str, own: bool, stamp: str, found: Sequence[tuple[Path, tuple[str, ...]]]
) -> Source:
    """Returns images in files below a folder, which were `found` there with the folders that each lies in; the class is
    the name of the first of these, where all have one.

    Raises:
        ConfigError: there is no image in them.
    """
    from datasets import Dataset

    inside = dict(found)
    files = sorted(_once(p for p in inside if p.is_file()), key=lambda p: (*inside[p], p.name))
    each = all_contents(files, data)
    rows = [(i, n) for i, of in enumerate(each) for n in range(len(of.images))]
    if not rows:
        raise ConfigError(f"{origin}: none of the {len(files)} files below this folder has an image")
    parts = [(*inside[p], p.name) for p in files]
    texts = [_text(str(Path(*part))) for part in parts]
    several = [len(of.images) > 1 for of in each]
    names = [f"{texts[i]} {n + 1}" if several[i] else texts[i] for i, n in rows]
    columns: dict[str, list[str]] = {"file": names}
    if all(len(part) > 1 for part in parts):
        columns[data.label_column] = [_text(parts[i][0]) for i, _ in rows]
    if all(each[i].patient for i, _ in rows):
        columns[PATIENT] = [each[i].patient for i, _ in rows]

    def fill(chosen: Sequence[int], out: Images) -> Decoded:
        logged = [names[row] for row in chosen]
        told = [f"file {rows[row][0] + 1} in order of name" for row in chosen] if own else None
        images = (each[i].images[n] for i, n in (rows[row] for row in chosen))
        return decode(data, images, told or logged, origin, out, logged)

    return Source(
        origin,
        Dataset.from_dict(columns),
        fill,
        stamp,
        names=tuple(names),
        together=tuple(texts[i] for i, _ in rows) if any(several) else (),
        left_out=tuple(sorted(sum((of.left_out for of in each), Counter[str]()).items())),
    )


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
