"""Where images come from: the embedded digits, a folder, parquet, a data set of a hub. Nothing is decoded yet."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from feddm_flwr.config import ConfigError, RunConfig, expanded, local_path
from feddm_flwr.data.images import ENDINGS, Decoded, Images, decode, fit
from feddm_flwr.data.source import Source

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

_PARQUET = "[!.]*.parquet"
_SPLITS = {"train", "test", "validation", "val"}
# What systems, and network storage, put beside the images.
_OF_THE_DISK = {"lost+found", "System Volume Information", "@eaDir", "#recycle", "#snapshot"}
_DIGITS_TEST_SHARE = 5  # one digit in five is kept apart from training, as split "test"


def _walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The folders below a path with their files, in order of name. Links are followed; what is hidden is left out, such
    as a wastebasket or thumbnails: an image and its copy must not be held out and trained on.

    Raises:
        OSError: a folder cannot be read; its images would be missing without a word.
    """

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, files in os.walk(path, onerror=fail, followlinks=True):
        if (here := os.path.realpath(folder)) in seen:  # a link back
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "$")) and name not in _OF_THE_DISK)
        yield folder, sorted(name for name in files if not name.startswith("."))


def _pictures(path: Path) -> Iterator[Path]:
    """The image files below a path."""
    for folder, names in _walk(path):
        yield from (Path(folder, name) for name in names if name.lower().endswith(ENDINGS))


def stamp_of(name: str, origin: str) -> str:
    """What changes when an image or a parquet file does that has this name, or is below it; "" where there is none.

    Raises:
        ConfigError: a folder cannot be read; `origin` says whose it is.
    """
    try:
        return _stamp(name)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror}), or a folder below it") from error


def _stamp(name: str) -> str:
    path = expanded(name)
    if not path.exists():
        return ""
    digest, known = hashlib.sha256(), (*ENDINGS, ".parquet")
    for folder, files in _walk(path) if path.is_dir() else [(str(path.parent), [path.name])]:
        for file in files:
            if not file.lower().endswith(known):  # what else lies there may change at any time
                continue
            try:
                found = os.stat(f"{folder}/{file}")  # noqa: PTH116 (half the time that a Path takes, in every task)
            except OSError:  # a link to nothing
                continue
            digest.update(f"{folder}/{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


@lru_cache(maxsize=2)
def open_source(config: RunConfig, name: str, origin: str, *, stamp: str) -> Source:
    """A data set by name or path, nothing decoded yet.

    Raises:
        ConfigError: it cannot be had, or is not what the configuration says.
    """
    try:
        return _open(config, name, origin, None, stamp)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error})") from error


def open_named(config: RunConfig) -> Source:
    """The data set of `data.name` as it is now.

    Raises:
        ConfigError: as `open_source`.
    """
    name = config.data.name
    origin = f"data.name = {name!r}"
    return open_source(config, name, origin, stamp=stamp_of(name, origin))


def open_own(config: RunConfig, path: str, origin: str, *, stamp: str, scratch: Path) -> Source:
    """A node's own images, which must be here: no name is looked up elsewhere, and no file's name goes into a message.
    Copies of them that the reading takes are made in `scratch`.

    Raises:
        ConfigError: as `open_source`.
    """
    try:
        return _open(config, path, origin, scratch, stamp)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror})") from error


def _open(config: RunConfig, name: str, origin: str, scratch: Path | None, stamp: str) -> Source:
    import datasets

    own = scratch is not None
    if name == "digits" and not own:
        return _digits(config, origin)
    path = expanded(name)
    if path.is_dir() and not sorted(path.glob(_PARQUET)):
        first = {  # folders with images; "": there are some beside them
            (*Path(folder).relative_to(path).parts, "")[0]
            for folder, names in _walk(path)
            if any(name.lower().endswith(ENDINGS) for name in names)
        }
        below = _split({folder: [path / folder] for folder in sorted(first)}, config.data.split, origin)
        return _folder(config, below[0] if below else path, origin, own, stamp)
    if not path.exists() and (own or local_path(name) or path.suffix == ".parquet"):
        raise ConfigError(f"{origin}: no such file or folder")
    try:
        if path.exists():
            files = sorted(path.glob(_PARQUET)) if path.is_dir() else [path]
            by_split: dict[str, list[Path]] = {}
            for file in files:  # a hub's are called train-00000-of-00002.parquet
                by_split.setdefault(file.stem.partition("-")[0], []).append(file)
            chosen = _split(by_split if path.is_dir() else {}, config.data.split, origin) or files
            found = ("parquet", {"data_files": [*map(str, chosen)], "split": "train"})
        else:
            found = (name, {"split": config.data.split})
        if config.data.streaming:
            return _stream(config, origin, own, stamp, *found)
        return _table(config, origin, own, stamp, datasets.load_dataset(found[0], cache_dir=scratch, **found[1]))
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds for many causes
        if own:
            log.warning("%s: %s", origin, error)  # in the node's own log
        what = "" if own else f": {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"{origin}: cannot be read ({type(error).__name__}{what}); must be digits, "
            "a Hugging Face data set id in reach, a folder of images, or parquet with images in column "
            f"{config.data.image_column!r}"
        ) from error


def _split(found: dict[str, list[Path]], split: str, origin: str) -> list[Path]:
    """What belongs to a split, where everything that was `found` is of one; nothing where there are none."""
    if len({*found} & _SPLITS) > 1 and not {*found} <= _SPLITS:
        there = ", ".join(sorted({*found} & _SPLITS))
        raise ConfigError(
            f"{origin}: has {there} beside others, so that images to test with would be trained on: leave only splits "
            "there, or name the folder that is meant"
        )
    if found and {*found} <= _SPLITS and split in found:
        return found[split]
    if split != "train" or (found and {*found} <= _SPLITS):
        there = ", ".join(sorted({*found} & _SPLITS)) or "none"
        raise ConfigError(f"data.split = {split!r}: {origin} has no such split; there are: {there}")
    return []


def _table(config: RunConfig, origin: str, own: bool, stamp: str, table: Dataset) -> Source:
    """A data set that is on this machine's disk."""
    import datasets

    column = config.data.image_column
    _check_column(column, origin, own, table.column_names)
    table = table.cast_column(column, datasets.Image(decode=False))

    def fill(rows: Sequence[int], out: Images) -> Decoded:
        cells = (row[column] for row in table.select(rows).select_columns([column]))
        return decode(config.data, map(_file, cells), [f"row {row}" for row in rows], origin, out)

    return Source(origin, table, fill, stamp or table._fingerprint)


def _stream(config: RunConfig, origin: str, own: bool, stamp: str, name: str, options: dict[str, Any]) -> Source:
    """A data set of which nothing is kept but its classes. Parquet is read by column: these cost little."""
    import datasets
    from huggingface_hub import HfApi

    d = config.data
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
    """What a cell of an image column is decoded from."""
    if not cell or not (cell["bytes"] or cell["path"]):
        return None
    return cell["bytes"] or (cell["path"] if "://" in cell["path"] else Path(cell["path"]))


def _check_column(column: str, origin: str, own: bool, names: Sequence[str]) -> None:
    if column not in names:
        if own:
            log.warning("%s: has the columns %s", origin, [*names])  # in the node's own log
        there = "the node's own log says which there are" if own else f"has {[*names]}"
        raise ConfigError(f"data.image-column = {column!r}: no such column; {origin}: {there}")


def _digits(config: RunConfig, origin: str) -> Source:
    """scikit-learn's 1,797 handwritten digits (UCI ML repository), 8x8 with values 0..16."""
    from datasets import Dataset

    if config.data.split not in ("train", "test"):
        raise ConfigError(f"data.split = {config.data.split!r}: must be train or test for digits")
    # Importing it would take longer than all else that an introduction needs.
    where = Path(str(find_spec("sklearn").origin)).parent  # type: ignore[union-attr]
    digits = np.loadtxt(where / "datasets/data/digits.csv.gz", np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(digits))
    test = len(order) // _DIGITS_TEST_SHARE
    rows = order[test:] if config.data.split == "train" else order[:test]
    images = np.round(digits[rows, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    table = Dataset.from_dict({"label": digits[rows, -1].astype(np.int64)})

    def fill(chosen: Sequence[int], out: Images) -> Decoded:
        for i, row in enumerate(chosen):
            out[i] = fit(config.data, Image.fromarray(images[row]))
        count = len(chosen)
        return Decoded([*range(count)], {}, Counter({(8, 8): count}), Counter({"L": count}))

    return Source(origin, table, fill, "scikit-learn")


def _folder(config: RunConfig, path: Path, origin: str, own: bool, stamp: str) -> Source:
    """Images below a folder; the class is the name of the first subfolder, where there is one."""
    from datasets import Dataset

    files = sorted(_once(p for p in _pictures(path) if p.is_file()))
    if not files:
        raise ConfigError(f"{origin}: no images below this folder; known endings are {' '.join(ENDINGS)}")
    parts = [p.relative_to(path).parts for p in files]
    columns: dict[str, list[str]] = {"file": [_text(str(Path(*part))) for part in parts]}
    if all(len(part) > 1 for part in parts):
        columns[config.data.label_column] = [_text(part[0]) for part in parts]

    def fill(rows: Sequence[int], out: Images) -> Decoded:
        names = [f"file {i + 1} in order of name" if own else columns["file"][i] for i in rows]
        return decode(config.data, (files[i] for i in rows), names, origin, out)

    return Source(origin, Dataset.from_dict(columns), fill, stamp, names=tuple(columns["file"]))


def _once(files: Iterable[Path]) -> Iterator[Path]:
    """Without links to files that are there as well."""
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
    """A file's name as text, though it be of another encoding than the system's."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
