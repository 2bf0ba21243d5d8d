"""Pictures of samples, and the labels that samples are drawn of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from feddm_flwr.data.images import Images


def every_class(classes: int, count: int) -> list[int]:
    """Returns labels for `count` images, as many of each class as can be, class by class."""
    return [i * classes // count for i in range(count)]


def labels_like(counts: Mapping[str, int], names: Sequence[str], count: int) -> list[int]:
    """Returns labels of `count` samples, of each class in proportion to its images."""
    shares = np.cumsum([counts.get(name, 0) for name in names], dtype=float)
    places = (np.arange(count) + 0.5) / count * shares[-1]
    return [int(i) for i in np.searchsorted(shares, places, side="right")]


def to_image(pixels: Images) -> Image.Image:
    """Returns one uint8 image (C, H, W) as a picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def grid(images: Images, cell: int = 56, columns: int = 0) -> Image.Image:
    """Returns the images in a grid of so many columns, 0: near-square; small ones are enlarged smoothly to about `cell`
    pixels, since nobody reads an 8x8 digit as it is."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, round(cell / height))
    height, width, gap = height * scale, width * scale, 2
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        canvas.paste(to_image(image).resize((width, height), Image.Resampling.BICUBIC), place)
    return canvas
