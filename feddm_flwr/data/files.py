"""Files below a folder: which count, and what changes when one of them does."""

from __future__ import annotations

import hashlib
import mimetypes
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from feddm_flwr.config import ConfigError, expanded

#: What is taken for an image by its name; what is called otherwise is, where its content is an image's.
IMAGES: tuple[str, ...] = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
)
IMAGES += (".tif", ".tiff", ".webp")
#: Files of tables.
TABLES = (".parquet", ".arrow")
#: What Pillow knows by its content, and every part of this package reads.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Never looked into: there may be one beside each image, and some change while a run goes on.
_TEXTS: tuple[str, ...] = (
    ".csv",
    ".db",
    ".json",
    ".jsonl",
    ".lock",
    ".log",
    ".md",
    ".npy",
    ".npz",
    ".py",
    ".tsv",
    ".txt",
    ".xml",
)
_TEXTS += (".yaml", ".yml", ".zip", ".tar", ".gz", ".h5", ".pt", ".safetensors", ".toml", ".html", ".pdf")
# Endings that are told; another might be part of a patient's name.
_TOLD = {*IMAGES, *TABLES, *_TEXTS, ".heic", ".heif", ".dcm", ".dicom", ".nii", ".svs", ".ndpi", ".mrxs", ".czi"}
_TOLD |= {
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".dng",
    ".orf",
    ".rw2",
    ".raw",
    ".jxl",
    ".psd",
    ".exr",
    ".mha",
    ".nrrd",
    ".mat",
}
#: Formats that Pillow does not know, which are extras of that name: the library that reads each, and how names end.
_FORMATS = {
    "dicom": ("pydicom", (".dcm", ".dicom")),
    "nifti": ("nibabel", (".nii", ".nii.gz")),
}
_PREAMBLE = 128  # bytes of a DICOM file before it says that it is one
_MAGIC = b"DICM"
_THERE = {name for name, (library, _) in _FORMATS.items() if find_spec(library)}
#: Bytes that tell a pointer of Git LFS, and what is wrong with it.
HEAD = 40
POINTER = "a pointer of Git LFS: git lfs pull puts the file in its place"
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


def files_below(path: Path) -> Iterator[Path]:
    """Yields every file below a path that is not hidden."""
    for folder, names in walk(path):
        yield from (Path(folder, name) for name in names)


def is_image(path: str) -> bool:
    """Tells whether a file has images that can be read here."""
    return bool(format_of(path))


def format_of(path: str) -> str:
    """Returns what reads a file, `pillow`, `dicom` or `nifti`, by its ending, or by its content, as others call theirs
    `.jfif` or nothing; "" where nothing on this machine does."""
    name = path.lower()
    if name.endswith(IMAGES):
        return "pillow"
    if named := _named(name):
        return named if named in _THERE else ""
    if name.endswith((*_TEXTS, *TABLES)):
        return ""
    try:
        found = os.stat(path)  # noqa: PTH116 (half the time that a Path takes)
    except OSError:  # a link to nothing
        return ""
    return _by_content(path, found.st_size, found.st_mtime_ns)


def missing(path: Path) -> str:
    """Returns which extra would read a file, by its name, where this machine has not got it; else ""."""
    named = _named(path.name.lower())
    return named if named not in _THERE else ""


def _named(name: str) -> str:
    return next((own for own, (_, endings) in _FORMATS.items() if name.endswith(endings)), "")


@lru_cache(maxsize=100_000)
def _by_content(path: str, size: int, changed: int) -> str:
    try:
        with Image.open(path, formats=FORMATS):
            return "pillow" if size > 0 else ""
    except Exception:  # Pillow raises nearly anything on what is none
        pass
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (as above)
            is_one = file.read(_PREAMBLE + len(_MAGIC))[_PREAMBLE:] == _MAGIC
    except OSError:
        return ""
    return "dicom" if is_one and "dicom" in _THERE else ""


def is_pointer(head: bytes) -> bool:
    """Tells whether a file that begins so only says what Git LFS would put in its place."""
    return head.startswith(b"version https://git-lfs")


def ending(path: Path) -> str:
    """Returns the ending of a file's name, where it is one that may be told: a name after a dot may be a person's."""
    own = path.suffix.lower()
    return own if own in _TOLD or mimetypes.guess_type(f"x{own}")[0] else "other" if own else "no ending"


def stamp_of(name: str, origin: str, *, every: bool = False) -> str:
    """Returns what changes when an image or a table does that has this name, or is below it, or `every` file; "" where
    there is none.

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
    digest = hashlib.sha256()
    for folder, files in walk(path) if path.is_dir() else [(str(path.parent), [path.name])]:
        for file in files:
            # What else lies there may change at any time.
            if not (every or file.lower().endswith(TABLES) or is_image(f"{folder}/{file}")):
                continue
            try:
                found = os.stat(f"{folder}/{file}")  # noqa: PTH116 (half the time that a Path takes, in every task)
            except OSError:  # a link to nothing
                continue
            digest.update(f"{folder}/{file} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
