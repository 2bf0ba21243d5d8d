"""A reader: images as NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from feddm_flwr.config import ConfigError
from feddm_flwr.config.data import Data
from feddm_flwr.data.images import Decoded, Images, fit
from feddm_flwr.data.readers import Reader
from feddm_flwr.data.source import Source


class Arrays(Reader):
    """Reads an `.npz` file with `images`, uint8 (N, H, W) or (N, H, W, 3), and, where there are classes, `labels`."""

    def open(self, path: Path, data: Data, origin: str, stamp: str) -> Source:
        from datasets import Dataset

        try:
            with np.load(path) as file:
                images, labels = file["images"], file.get("labels")
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{origin}: must be an .npz file with images ({type(error).__name__})") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ConfigError(f"{origin}: images must be uint8 (N, H, W) or (N, H, W, 3), not {images.dtype}")

        def fill(rows: Sequence[int], out: Images) -> Decoded:
            found = Decoded()
            for place, row in enumerate(rows):
                found.take(place, fit(data, images[row]), out)
            return found

        columns = {"row": [*range(len(images))]} if labels is None else {data.label_column: labels}
        return Source(origin, Dataset.from_dict(columns), fill, stamp)
