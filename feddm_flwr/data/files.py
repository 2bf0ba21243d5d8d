"""Files below a folder: which count, and what changes when one of them does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from feddm_flwr.config import ConfigError, expanded
from feddm_flwr.data.images import ENDINGS

# What systems, and network storage, put beside the images.
_OF_THE_DISK = {"lost+found", "System Volume Information", "@eaDir", "#recycle", "#snapshot"}


def walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the folders below a path with their files, in order of name. Links are followed; what is hidden is left
    out, such as a wastebasket or thumbnails: an image and its copy must not be held out and trained on.

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


def pictures(path: Path) -> Iterator[Path]:
    """Yields the image files below a path."""
    for folder, names in walk(path):
        yield from (Path(folder, name) for name in names if name.lower().endswith(ENDINGS))


def stamp_of(name: str, origin: str, *, every: bool = False) -> str:
    """Returns what changes when an image or a parquet file does that has this name, or is below it, or `every` file; ""
    where there is none.

    Raises:
        ConfigError: a folder cannot be read; `origin` says whose it is.
    """
    try:
        return _stamp(name, every)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror}), or a folder below it") from error


def _stamp(name: str, every: bool) -> str:
    path = expanded(name)
    if not path.exists():
        return ""
    digest, known = hashlib.sha256(), (*ENDINGS, ".parquet")
    for folder, files in walk(path) if path.is_dir() else [(str(path.parent), [path.name])]:
        for file in files:
            if not (every or file.lower().endswith(known)):  # what else lies there may change at any time
                continue
            try:
                found = os.stat(f"{folder}/{file}")  # noqa: PTH116 (half the time that a Path takes, in every task)
            except OSError:  # a link to nothing
                continue
            digest.update(f"{folder}/{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
