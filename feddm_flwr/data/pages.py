"""Files that Pillow knows and that have several pages or frames, as an image each (`data.pages = "all"`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from feddm_flwr.config.data import Data
from feddm_flwr.data.formats import Contents
from feddm_flwr.data.images import PAGED, Fitted, Part, fit


def contents(path: Path, data: Data) -> Contents:
    """Returns the pages of a file."""
    try:
        with Image.open(path) as image:
            count = getattr(image, "n_frames", 1) if image.format in PAGED else 1
    except Exception:  # what is wrong with it is said when it is decoded
        count = 1
    return Contents([path] if count == 1 else [Page(path, i) for i in range(count)])


@dataclass(frozen=True)
class Page(Part):
    """A page of a file."""

    path: Path
    index: int

    def read(self, data: Data) -> Fitted:
        with Image.open(self.path) as image:
            image.seek(self.index)
            return replace(fit(data, image), pages=0)
