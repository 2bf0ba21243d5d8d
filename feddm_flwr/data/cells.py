"""What a cell of a table's image column is: a file, its path or address, its base64 text, or pixels as numbers.

Nothing that is in a cell goes into a message or a log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from feddm_flwr.config.data import Data
from feddm_flwr.data.files import FORMATS
from feddm_flwr.data.images import File, UnclearError
from feddm_flwr.data.intensities import asked_range

_BASE64 = 32  # characters from which text may be an image
_BYTE = 255

#: Makes pixels of a cell's numbers.
Pixels = Callable[[Any], NDArray[Any]]


def holds_lists(kind: object) -> bool:
    """Tells whether a column of that `datasets` feature has several values in a cell."""
    return type(kind).__name__ in ("List", "LargeList", "Sequence", "list") or type(kind).__name__.startswith("Array")


def holds_images(kind: object) -> bool:
    """Tells whether a column of that feature has images for sure, or files."""
    fields = {*kind} if isinstance(kind, Mapping) else set()
    is_file = getattr(kind, "dtype", "") in ("binary", "large_binary")
    return type(kind).__name__ in ("Image", "Array2D", "Array3D") or is_file or {"bytes", "path"} <= fields


def pixels_of(data: Data, rows: Any) -> Callable[[], Pixels]:
    """Returns how to make pixels of the numbers in the image column of a `datasets` table or stream, decided by all of
    them when it is first asked: whole numbers from 0 to 255 are of 8 bits unless the configuration says what is
    white."""

    @cache
    def decided() -> Pixels:
        kind = (rows.features or {}).get(data.image_column)
        if not holds_lists(kind):
            return _pixels(None)
        leaf, bytes_only = None, not asked_range(data)
        for part in rows.with_format("arrow").iter(1000):
            column = part[data.image_column]
            for values in map(_leaves, getattr(column, "chunks", [column])):
                leaf = leaf or np.dtype(values.type.to_pandas_dtype())
                if len(values) and bytes_only:
                    found = np.asarray(values.drop_null())
                    bytes_only = (
                        found.dtype.kind in "iub" and found.min(initial=0) >= 0 and found.max(initial=0) <= _BYTE
                    )
        whole = leaf is not None and leaf.kind in "iu"
        return _pixels(np.dtype(np.uint8) if whole and bytes_only else leaf)

    return decided


def _leaves(array: Any) -> Any:
    """Returns the numbers in an Arrow array of lists."""
    array = getattr(array, "storage", array)
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        array = array.flatten()
    return array


def _pixels(kind: np.dtype[Any] | None) -> Pixels:
    def make(cell: Any) -> NDArray[Any]:
        try:
            return np.asarray(cell, kind)
        except (TypeError, ValueError, OverflowError):
            raise UnclearError("numbers that are no image: the rows are of different lengths") from None

    return make


def is_path(cell: Any) -> bool:
    """Tells whether a cell is a path, and not a file."""
    return isinstance(cell, str) or (isinstance(cell, Mapping) and not cell.get("bytes") and bool(cell.get("path")))


def file_of(cell: Any, folders: Sequence[Path], pixels: Callable[[], Pixels]) -> File:
    """Returns what a cell is decoded from; a path starts at the first of the folders that has such a file, else at the
    working folder."""
    if isinstance(cell, Mapping):
        if not {*cell} & {"bytes", "path"}:
            return UnclearError("a cell with other fields than bytes and path")
        cell = cell.get("bytes") or cell.get("path")
    if cell is None or isinstance(cell, bytes):
        return cell or None
    if isinstance(cell, str):
        return _file_of_text(cell, folders) if cell else None
    try:
        if isinstance(cell, list) and cell and not isinstance(cell[0], list | np.ndarray):
            raise UnclearError("a list that is no image: must be (H, W), (H, W, C) or (C, H, W), or one file a row")
        return pixels()(cell)
    except UnclearError as error:
        return error


def stamp_of_paths(cells: Iterable[Any], folders: Sequence[Path]) -> str:
    """Returns what changes when a file does whose path one of the cells is; "" where an image in base64 comes
    before any path: each would be decoded for nothing."""
    digest, paths = hashlib.sha256(), False
    for cell in cells:
        file = file_of(cell, folders, lambda: np.asarray)
        if isinstance(file, bytes) and not paths:
            return ""
        paths = paths or isinstance(file, Path)
        if isinstance(file, Path) and file.exists():
            found = file.stat()
            digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _file_of_text(text: str, folders: Sequence[Path]) -> File:
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        return _decoded(rest) or UnclearError("base64 text that is no image")
    if "://" in text[:100]:
        return text
    if len(text) >= _BASE64 and (content := _decoded(text)):
        return content
    if len(os.fsencode(text)) > os.pathconf("/", "PC_PATH_MAX"):
        return UnclearError("text that is neither a path nor base64")
    places = [folder / text for folder in folders]
    return next((place for place in places if place.is_file()), Path(text))


def _decoded(text: str) -> bytes | None:
    """Returns the image that text is in base64; None where it is none, such as a path."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        with Image.open(io.BytesIO(content), formats=FORMATS):
            return content
    except (ValueError, binascii.Error, OSError, SyntaxError):
        return None
