"""Which data set is meant: the embedded digits, a folder, parquet, one of a hub, or what an extension reads."""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from feddm_flwr.config import ConfigError, expanded, local_path
from feddm_flwr.config.data import Data
from feddm_flwr.config.plugins import is_plugin
from feddm_flwr.data.files import HEAD, POINTER, TABLES, ending, files_below, is_image, is_pointer, missing, stamp_of
from feddm_flwr.data.readers import read_digits, read_folder, read_stream, read_table, reader_class
from feddm_flwr.data.source import Source
from feddm_flwr.data.splits import ALL, check_masks, in_split, no_such_split

log = logging.getLogger(__name__)

#: What the library calls tables; in a folder only those of `TABLES` are looked for.
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_OF_A_SAVED_SET = {"dataset_info.json", "state.json", "dataset_dict.json"}  # see `datasets.Dataset.save_to_disk`


@lru_cache(maxsize=2)
def open_source(data: Data, name: str, origin: str, *, stamp: str) -> Source:
    """Returns a data set by name or path, nothing decoded yet.

    Raises:
        ConfigError: it cannot be had, or is not what the configuration says.
    """
    try:
        return _open(data, name, origin, None, stamp)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error})") from error


def open_named(data: Data) -> Source:
    """Returns the data set of `data.name` as it is now.

    Raises:
        ConfigError: as `open_source`.
    """
    name = data.name
    origin = f"data.name = {name!r}"
    return open_source(data, name, origin, stamp=stamp_of(name, origin, every=data.reader != "auto"))


def open_own(data: Data, path: str, origin: str, *, stamp: str, scratch: Path) -> Source:
    """Returns a node's own images, which must be here: no name is looked up elsewhere, and no file's name goes into a
    message. Copies of them that the reading takes are made in `scratch`.

    Raises:
        ConfigError: as `open_source`.
    """
    try:
        return _open(data, path, origin, scratch, stamp)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror})") from error


def _open(data: Data, name: str, origin: str, scratch: Path | None, stamp: str) -> Source:
    own = scratch is not None
    if is_plugin(data.reader):
        if not expanded(name).exists():
            raise ConfigError(f"{origin}: no such file or folder, which data.reader = {data.reader!r} could read")
        return reader_class(data.reader)().open(expanded(name), data, origin, stamp)
    path = expanded(name)
    if data.subset and (own or name == "digits" or path.exists()):
        raise ConfigError(f"data.subset = {data.subset!r}: is for a data set of a hub; {origin} has none")
    if name == "digits" and not own:
        return read_digits(data, origin)
    if not path.exists():
        if own or local_path(name) or path.suffix.lower() in _KINDS:
            raise ConfigError(f"{origin}: no such file or folder")
        return _tables(data, name, origin, None, stamp, [])
    if path.is_file():
        if data.split not in ("train", ALL):
            raise no_such_split(data.split, origin, ())
        return _tables(data, name, origin, scratch, stamp, [path])
    below = [file for file in files_below(path) if not (file.suffix == ".arrow" and file.name.startswith("cache-"))]
    tables = [file for file in below if file.name.lower().endswith(TABLES)]
    images = [] if any(file.parent == path for file in tables) else [file for file in below if is_image(str(file))]
    if tables and images:
        raise ConfigError(
            f"{origin}: has {len(images)} images and {len(tables)} parquet or arrow files below it; name the folder or "
            "the file that is meant"
        )
    if not tables and not images:
        raise ConfigError(f"{origin}: no images below this folder, and no parquet or arrow files; {_others(below)}")
    if images and data.split != ALL:
        check_masks(images, path, origin)
    chosen = in_split(tables or images, path, data.split, origin, tables=bool(tables))
    left = {*below} - {*tables} - {*images}
    if images:
        source = read_folder(data, path, origin, own, stamp, chosen)
    else:
        if len({folders for _, folders in chosen}) > 1:
            raise ConfigError(
                f"{origin}: has parquet or arrow files in several folders, which may be of different data sets; name "
                "the folder that is meant"
            )
        source = _tables(data, name, origin, scratch, stamp, sorted(file for file, _ in chosen), path)
        left = {
            file for file in left if file.name not in _OF_A_SAVED_SET and not (source.by_path and is_image(str(file)))
        }
    return replace(source, passed_over=tuple(sorted(Counter(map(ending, left)).items())))


def _kind(file: Path, origin: str) -> str:
    """Returns what the library calls a table of that kind, which is told by its ending, else by how it begins."""
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    if is_pointer(head):
        raise ConfigError(f"{origin}: {POINTER}")
    if not (kind := _KINDS.get(file.suffix.lower(), "parquet" if head.startswith(b"PAR1") else "")):
        raise ConfigError(
            f"{origin}: is a file that is no table; must be parquet, arrow, csv, tsv, json or jsonl, or a folder of "
            "images (unpack an archive first)"
        )
    return kind


def _others(files: Sequence[Path]) -> str:
    """Returns what there is where there are no images."""
    counts = Counter(map(ending, files))
    extras = {extra for file in files if (extra := missing(file))}
    hint = f"; pip install 'feddm-flwr[{','.join(sorted(extras))}]' reads them" if extras else ""
    return f"there are: {', '.join(f'{n} {what}' for what, n in sorted(counts.items())) or 'no files'}{hint}"


def _tables(
    data: Data,
    name: str,
    origin: str,
    scratch: Path | None,
    stamp: str,
    files: Sequence[Path],
    root: Path | None = None,
) -> Source:
    """Returns tables in files, or where there are none, the data set of that name on a hub."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell its makers of every file that is read here
    own = scratch is not None
    folders = [*dict.fromkeys([*(file.parent for file in files), *([root] if root else [])])]
    try:
        if files and all((file.parent / "state.json").is_file() for file in files):  # as save_to_disk leaves them
            saved = [datasets.load_from_disk(str(folder)) for folder in dict.fromkeys(file.parent for file in files)]
            return read_table(data, origin, own, stamp, datasets.concatenate_datasets(saved), folders)
        kinds = {file.suffix.lower() for file in files}
        if len(kinds) > 1:
            raise ConfigError(f"{origin}: has {' and '.join(sorted(kinds))} files; name the files that are meant")
        found: tuple[str, dict[str, Any]] = (name, {"name": data.subset or None, "split": data.split})
        if files:
            # The library takes paths for patterns, and :: for a chain of file systems.
            if any("::" in str(file) for file in files):
                raise ConfigError(f"{origin}: a path with :: cannot be read; rename the folder or the file")
            found = (
                _kind(files[0], origin),
                {"data_files": [glob.escape(str(file)) for file in files], "split": "train"},
            )
            found[1].update({"sep": "\t"} if kinds == {".tsv"} else {})
        if data.streaming and found[0] not in ("csv", "json"):  # which have paths, and little else
            return read_stream(data, origin, own, stamp, *found, folders)
        table = datasets.load_dataset(found[0], cache_dir=scratch, **found[1])
        return read_table(data, origin, own, stamp, table, folders)
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds for many causes
        if not files and (there := re.search(r"vailable\b[^\[]*\[(.*?)\]", str(error))):
            raise ConfigError(
                f"data.subset = {data.subset!r}: must be one of {there[1]}, which {origin} has"
            ) from error
        # What is in quotes may be a cell's.
        what = (
            re.sub(r"'[^']*'|\"[^\"]*\"", "…", str(error).partition("\n")[0])
            if files
            else str(error).partition("\n")[0]
        )
        if own:
            log.warning("%s: %s", origin, what)  # in the node's own log
        raise ConfigError(
            f"{origin}: cannot be read ({type(error).__name__}{'' if own else f': {what}'}); must be digits, "
            "a Hugging Face data set id in reach, a folder of images, or parquet with images in column "
            f"{data.image_column!r}"
        ) from error
