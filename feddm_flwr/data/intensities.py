"""From values of any range to what is black and what is white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from feddm_flwr.config import KEYS
from feddm_flwr.config.data import Data

_OUTLIERS = 0.5  # percent of the values, at either end, that are clipped where nobody says what is black
_ALIKE = 1.01  # up to this ratio of its sides, a pixel is square


def asked_range(data: Data) -> tuple[float, float] | None:
    """Returns what is black and what is white where the configuration says so: by a window, or by both ends."""
    if data.window_width:
        return data.window_center - data.window_width / 2, data.window_center + data.window_width / 2
    default = KEYS["data.black"].default, KEYS["data.white"].default
    return None if (data.black, data.white) == default else (data.black, data.white)


def grey(values: NDArray[Any], black: float, white: float) -> NDArray[np.uint8]:
    """Returns values of any type and shape as grey, clipped beyond black and white; what is no number is black."""
    scaled = (values.astype(np.float64) - black) * (255 / (white - black))
    return np.nan_to_num(scaled, nan=0.0).round().clip(0, 255).astype(np.uint8)


def spread(values: NDArray[Any]) -> tuple[float, float]:
    """Returns the ends of the values that are finite, without outliers; above each other, though all be the same."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, (_OUTLIERS, 100 - _OUTLIERS)))
    if low == high:  # nearly all are background
        low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1


def square_pixels(image: NDArray[np.uint8], rows: float, columns: float) -> Image.Image:
    """Returns an image whose pixels are as wide as they are high, of one whose rows and columns are so far apart."""
    made = Image.fromarray(image)
    if not (rows > 0 and columns > 0) or max(rows, columns) < _ALIKE * min(rows, columns):
        return made
    finest, (height, width) = min(rows, columns), image.shape[:2]
    size = round(width * columns / finest), round(height * rows / finest)
    return made.resize(size, Image.Resampling.BICUBIC)
