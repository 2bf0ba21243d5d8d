"""Files that hold several images, or are of a format that Pillow does not know; a module reads each format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol

from feddm_flwr.config.data import Data
from feddm_flwr.data.files import format_of
from feddm_flwr.data.images import File


@dataclass
class Contents:
    """The images in a file."""

    images: Sequence[File] = ()
    patient: str = ""  # a hash of whose they are
    left_out: Counter[str] = field(default_factory=Counter)  # what was, and how much of it


class _Format(Protocol):
    def contents(self, path: Path, data: Data) -> Contents:
        """Returns the images in a file; where it is broken, an error in their place."""


def all_contents(paths: Sequence[Path], data: Data) -> list[Contents]:
    """Returns the images in each of some files, which are looked into where one may have several, or none."""
    formats = [format_of(str(path)) for path in paths]
    if data.pages == "first" and {*formats} <= {"pillow"}:
        return [Contents([path]) for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(lambda path, name: _contents(path, name, data), paths, formats)]


def _contents(path: Path, name: str, data: Data) -> Contents:
    if name == "pillow" and data.pages == "first":
        return Contents([path])
    module: _Format = import_module(f"feddm_flwr.data.{'pages' if name == 'pillow' else name}")
    return module.contents(path, data)
