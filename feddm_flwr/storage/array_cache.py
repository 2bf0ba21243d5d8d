"""Arrays that cost time to make, kept on a node's disk: made once, then memory-mapped by every process.

    <state-path>/cache/<fingerprint>/*.npy, facts.json

An entry appears whole or not at all. One that nobody used for two weeks is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from feddm_flwr.storage.atomic import forget_unfinished, forgotten, whole_folder

log = logging.getLogger(__name__)

_FACTS = "facts.json"
_SUPERSEDED = 3600.0  # seconds


def cached(root: Path, key: Mapping[str, object], version: str, fill: Callable[[Path], None]) -> Path:
    """Returns the folder of what depends on `key`, and the `version` of what it is made from, and on nothing else;
    where it is not there, `fill` makes its files.

    Of several processes that want it at once, one fills it and the others wait. Other versions that nobody used for an
    hour go: a folder of images that grows every day would have a copy of all for each.

    Raises:
        OSError: it cannot be written.
    """
    texts = json.dumps(key, sort_keys=True), version
    of_key, of_version = (hashlib.sha256(text.encode()).hexdigest()[:20] for text in texts)
    folder = root / "cache" / f"{of_key}{of_version}"
    if not (folder / _FACTS).is_file():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _forget_old(folder.parent)
        with FileLock(f"{folder}.lock"):  # ends with the process, however that ends
            if not (folder / _FACTS).is_file():
                forget_unfinished(folder.parent, name=folder.name)
                with whole_folder(folder) as filled:
                    filled.mkdir()
                    fill(filled)
        _forget_superseded(folder, of_key)
    os.utime(folder)
    return folder


def new_array(folder: Path, name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Returns an array in a file of the folder, to be written to.

    Raises:
        OSError: the disk has no room for it. (Written through the mapping, a full disk would kill the process.)
    """
    path = folder / f"{name}.npy"
    array: NDArray[Any] = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def array(folder: Path, name: str) -> NDArray[Any]:
    """Returns an array of an entry, memory-mapped; what is written to it stays in this process."""
    mapped: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c")
    return mapped


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes what there is to know of an entry beside its arrays."""
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def facts(folder: Path) -> dict[str, Any]:
    """Returns what `write_facts` wrote."""
    read: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    return read


def _forget_superseded(folder: Path, of_key: str) -> None:
    """Removes entries of other versions; who has mapped an array that goes keeps it until it ends."""
    for other in folder.parent.glob(f"{of_key}*"):
        with suppress(OSError):  # another process was faster
            if other != folder and other.is_dir() and time.time() - other.stat().st_mtime > _SUPERSEDED:
                log.info("removing %s: the images have changed since", other)
                shutil.rmtree(other)


def _forget_old(folder: Path) -> None:
    for entry in folder.iterdir():
        try:
            if forgotten(entry.stat().st_mtime):
                log.info("removing %s: nobody used it for two weeks", entry)
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:  # of `assets`
                    entry.unlink()
        except OSError:  # another process was faster
            continue
