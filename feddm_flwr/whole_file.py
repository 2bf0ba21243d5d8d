"""Files and folders that appear whole or not at all, also through a crash or a loss of power."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is put in place under its name when the block ends without an error.

    Raises:
        OSError: the disk is full, say; an earlier file of that name is untouched then.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to make and fill, which takes the place of an earlier one of that name when the block ends
    without an error."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        filled = Path(temporary) / path.name
        yield filled
        shutil.rmtree(path, ignore_errors=True)
        filled.rename(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
