"""Image files to uint8 pixels, by one rule everywhere.

EXIF orientation applied; grey of more than 8 bits scaled so that `data.white` becomes 255; transparency laid on white;
converted to grey or RGB; the shorter side resized to `data.image-size` with Pillow's antialiased bicubic filter
(what Parmar et al. 2022, clean-fid, ask for), centre-cropped to a square. Of several frames the first is taken.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from feddm_flwr.config import ConfigError
from feddm_flwr.config.keys import Data

Images = NDArray[np.uint8]  # (N, C, H, W)

log = logging.getLogger(__name__)

#: What of a folder counts as an image.
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PHOTOMETRIC = 262  # TIFF's PhotometricInterpretation
_AT_A_TIME = 256  # images in memory at a time
_SAY_EVERY = 10.0  # seconds


def fit(data: Data, image: Image.Image) -> Images:
    """Returns one image as uint8 (C, H, W), by the rule at the head of this file.

    Raises:
        ValueError: floating-point pixels, whose range nobody knows.
    """
    size = data.image_size
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported: their range is unknown")
    white = 65535 if image.format == "PPM" else data.white  # which says what is white, and Pillow stretches it to that
    black_is_high = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # some X-rays; Pillow heeds it for 8 bits only
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow also calls 32
        scaled = np.asarray(image).astype(np.float64) * (255 / white)
        scaled = scaled.round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(255 - scaled if black_is_high else scaled)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if data.channels == 1 else "RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    pixels: Images = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@dataclass
class Decoded:
    """What came of decoding some images."""

    kept: list[int] = field(default_factory=list)  # which of them are in the array now, in its order
    broken: dict[str, str] = field(default_factory=dict)  # those that cannot be read, by name: why
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) before
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's names: L, RGB, I;16, …

    def extent(self) -> str:
        """Returns the smallest and the largest size."""
        low, high = (f(self.sizes, key=lambda s: (s[0] * s[1], s), default=(0, 0)) for f in (min, max))
        return f"{low[0]}x{low[1]}" + (f" to {high[0]}x{high[1]}" if high != low else "")


def _opened(file: bytes | Path | str) -> IO[bytes]:
    """Returns a file's bytes; text is an address, such as of a hub's file."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    opened: IO[bytes] = file.open("rb") if isinstance(file, Path) else fsspec.open(file, "rb").open()
    return opened


def decode(
    data: Data, files: Iterable[bytes | Path | str | None], names: Sequence[str], origin: str, out: Images
) -> Decoded:
    """Decodes image files, in parallel, into the first rows of `out`, shape (N, C, H, W).

    Raises:
        ConfigError: more cannot be read than `data.max-broken` allows; the message counts them and names the first.
    """
    found = Decoded()

    def one(named: tuple[str, bytes | Path | str | None]) -> tuple[Images, tuple[int, int], str] | str:
        name, file = named
        try:
            if file is None:
                raise ValueError("no image")
            with _opened(file) as opened, Image.open(opened) as image:
                return fit(data, image), image.size, image.mode
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            log.warning("%s: %s cannot be read: %s", origin, file if isinstance(file, Path) else name, error)
            return type(error).__name__

    said = time.monotonic()
    waiting = zip(names, files, strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        batches = iter(lambda: [*islice(waiting, _AT_A_TIME)], [])
        for i, result in enumerate(chain.from_iterable(pool.map(one, batch) for batch in batches)):
            if isinstance(result, str):
                found.broken[names[i]] = result
                continue
            out[len(found.kept)], size, mode = result
            found.kept.append(i)
            found.sizes[size] += 1
            found.modes[mode] += 1
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                log.info("%s: %d of %d images decoded", origin, i + 1, len(names))
    if len(found.broken) > data.max_broken * len(names):
        listed = [f"{name} ({why})" for name, why in found.broken.items()]
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise ConfigError(
            f"{origin}: {len(listed)} of {len(names)} images cannot be read: {', '.join(listed[:3])}{more}; "
            f"repair or remove them (the node's own log has every name and cause), or raise data.max-broken = "
            f"{data.max_broken:g}, the share that is skipped"
        )
    return found
