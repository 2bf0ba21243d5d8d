"""Files and folders that appear whole or not at all, also through a crash or a loss of power."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

#: How what is not finished is named, which `forget_unfinished` removes.
UNFINISHED = ".writing-"
_FORGET_AFTER = 14 * 24 * 3600.0  # seconds


@contextmanager
def whole_file(path: Path, *, secret: bool = False) -> Iterator[BinaryIO]:
    """Opens a file to write to, which is put in place under its name when the block ends without an error. A `secret`
    one only its owner can read; others whoever the umask lets.

    Raises:
        OSError: the disk is full, say; an earlier file of that name is untouched then.
    """
    unfinished = path.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Names a folder to make and fill, which takes the place of an earlier one of that name when the block ends
    without an error."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{UNFINISHED}{path.name}-") as temporary:
        filled = Path(temporary) / path.name
        yield filled
        for folder, _, files in os.walk(filled):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        if path.exists():
            path.rename(Path(temporary) / "earlier")
        filled.rename(path)
        sync(path.parent)


def forget_unfinished(folder: Path, age: float = 0.0, name: str = "") -> None:
    """Removes what a process which was killed began to write there, if it is `age` seconds old; or only the unfinished
    folder of that name."""
    for path in folder.glob(f"{UNFINISHED}{name}*"):
        with suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime < age:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def forgotten(touched: float) -> bool:
    """Tells whether what was last used at that time, in seconds since the epoch, may be removed: after two weeks."""
    return time.time() - touched > _FORGET_AFTER


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
