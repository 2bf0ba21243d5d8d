"""Which data set is meant: the embedded digits, a folder, parquet, one of a hub, or what an extension reads."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from feddm_flwr.config import ConfigError, expanded, local_path
from feddm_flwr.config.keys import Data
from feddm_flwr.config.plugins import is_plugin
from feddm_flwr.data.files import stamp_of, walk
from feddm_flwr.data.images import ENDINGS
from feddm_flwr.data.readers import read_digits, read_folder, read_stream, read_table, reader_class
from feddm_flwr.data.source import Source

log = logging.getLogger(__name__)

_PARQUET = "[!.]*.parquet"
_SPLITS = {"train", "test", "validation", "val"}


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
    import datasets

    own = scratch is not None
    if is_plugin(data.reader):
        if not expanded(name).exists():
            raise ConfigError(f"{origin}: no such file or folder, which data.reader = {data.reader!r} could read")
        return reader_class(data.reader)().open(expanded(name), data, origin, stamp)
    if name == "digits" and not own:
        return read_digits(data, origin)
    path = expanded(name)
    if path.is_dir() and not sorted(path.glob(_PARQUET)):
        first = {  # folders with images; "": there are some beside them
            (*Path(folder).relative_to(path).parts, "")[0]
            for folder, names in walk(path)
            if any(name.lower().endswith(ENDINGS) for name in names)
        }
        below = _split({folder: [path / folder] for folder in sorted(first)}, data.split, origin)
        return read_folder(data, below[0] if below else path, origin, own, stamp)
    if not path.exists() and (own or local_path(name) or path.suffix == ".parquet"):
        raise ConfigError(f"{origin}: no such file or folder")
    try:
        if path.exists():
            files = sorted(path.glob(_PARQUET)) if path.is_dir() else [path]
            by_split: dict[str, list[Path]] = {}
            for file in files:  # a hub's are called train-00000-of-00002.parquet
                by_split.setdefault(file.stem.partition("-")[0], []).append(file)
            chosen = _split(by_split if path.is_dir() else {}, data.split, origin) or files
            found = ("parquet", {"data_files": [*map(str, chosen)], "split": "train"})
        else:
            found = (name, {"split": data.split})
        if data.streaming:
            return read_stream(data, origin, own, stamp, *found)
        return read_table(data, origin, own, stamp, datasets.load_dataset(found[0], cache_dir=scratch, **found[1]))
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds for many causes
        if own:
            log.warning("%s: %s", origin, error)  # in the node's own log
        what = "" if own else f": {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"{origin}: cannot be read ({type(error).__name__}{what}); must be digits, "
            "a Hugging Face data set id in reach, a folder of images, or parquet with images in column "
            f"{data.image_column!r}"
        ) from error


def _split(found: dict[str, list[Path]], split: str, origin: str) -> list[Path]:
    """Returns what belongs to a split, where everything that was `found` is of one; nothing where there are none."""
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
