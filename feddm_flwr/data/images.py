"""Image files, and arrays of pixels, to uint8 pixels, by one rule everywhere.

What is black and what is white: 8 bits and fewer say it themselves. Grey integers of more bits are black at
`data.black` and white at `data.white`, or at the ends of the window that `data.window-center` and `data.window-width`
say, and clipped beyond; a PGM says its own white. Values below 0 and floating-point values, whose range nobody knows,
are refused unless one of the two is set.

EXIF orientation applied; transparency laid on white; converted to grey or RGB; the shorter side resized to
`data.image-size` with Pillow's antialiased bicubic filter (what Parmar et al. 2022, clean-fid, ask for),
centre-cropped to a square. Of several pages or frames the first is taken, and the others are counted.
"""

from __future__ import annotations

import io
import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from feddm_flwr.config import ConfigError
from feddm_flwr.config.data import Data
from feddm_flwr.data.files import HEAD, POINTER, is_pointer
from feddm_flwr.data.intensities import asked_range, grey

Images = NDArray[np.uint8]  # (N, C, H, W)


class UnclearError(ValueError):
    """An image that can be read, but not by what the configuration says. The message has nothing of the image in it."""


class RangeError(UnclearError):
    """An image of which nobody knows what is black and what is white in it."""

    def __init__(self, what: str, low: float, high: float) -> None:
        super().__init__(
            f"{what}: data.black and data.white must say what is black and what is white, or data.window-center and "
            "data.window-width"
        )
        self.low, self.high = low, high


log = logging.getLogger(__name__)

#: Up to this on a scale of 255 a pixel is all but black (12 bits of 16 are), and from 255 less this all but white.
DARK = 16
_PHOTOMETRIC = 262  # TIFF's PhotometricInterpretation
PAGED = {"TIFF", "GIF", "WEBP", "PNG", "AVIF"}  # what a camera's JPEG has behind its image is a preview
_AT_A_TIME = 256  # images in memory at a time
_BLOCK = 2**20  # pixels of many bits that are scaled at a time
_ELONGATED = 4  # from this ratio of the sides, an image is cropped before it is resized, not after
_LARGE = 50_000_000  # pixels from which images are decoded one after the other
_SAY_EVERY = 10.0  # seconds

# Pillow refuses twice as many: a bomb, or a scan that no memory holds.
Image.MAX_IMAGE_PIXELS = 2**29
# Of text and profiles in a PNG, which are passed over: it refuses images for 1 MiB of them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_one_large = threading.Lock()


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Values:
    """What values of more than 8 bits there are."""

    low: float = math.inf  # the smallest and the largest
    high: float = -math.inf
    count: int = 0
    clipped: int = 0  # those below black or above white

    def __add__(self, more: Values) -> Values:
        low, high = min(self.low, more.low), max(self.high, more.high)
        return Values(low, high, self.count + more.count, self.clipped + more.clipped)


@dataclass(frozen=True)
class Fitted:
    """An image as the model sees it, and what it was before."""

    pixels: Images  # (C, H, W)
    size: tuple[int, int]  # (width, height)
    mode: str  # Pillow's name; of an array with NumPy's of its values
    values: Values = Values()
    pages: int = 0  # that are left out


class Part(ABC):
    """An image that is one of several in a file, or of a format that Pillow does not know."""

    @abstractmethod
    def read(self, data: Data) -> Fitted:
        """Returns it by the rule at the head of this file; an error may have nothing of the image in its message."""


#: What an image is decoded from: a file's bytes, its path, its address, its pixels, a part of a file; None where there
#: is none. An error says what is wrong with it.
File = bytes | Path | str | NDArray[Any] | Part | UnclearError | None


def fit(data: Data, image: Image.Image | NDArray[Any]) -> Fitted:
    """Returns one image by the rule at the head of this file. An array is (H, W), (H, W, C) or (C, H, W) with C of 1, 3
    or 4, and has 8 bits where its type is uint8.

    Raises:
        UnclearError: nobody knows what is black and what is white in it, or it is no image.
    """
    if isinstance(image, np.ndarray):
        return _fit_array(data, image)
    size, mode = image.size, image.mode
    pages = getattr(image, "n_frames", 1) - 1 if image.format in PAGED else 0
    if image.format == "PPM" and mode.startswith("I"):  # it says what is white, and Pillow stretches it to 65535
        data = replace(data, black=0.0, white=65535.0, window_width=0.0)
    black_is_high = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # some X-rays; Pillow heeds it for 8 bits only
    ImageOps.exif_transpose(image, in_place=True)
    image, box = _cropped(image, data.image_size)
    values = Values()
    if mode.startswith(("I", "F")):  # Pillow calls 16 bits I, too
        scaled, values = _to_8_bits(data, np.asarray(image))
        image = Image.fromarray(255 - scaled if black_is_high else scaled)
    return Fitted(_squared(data, image, box), size, mode, values, pages)


def _fit_array(data: Data, array: NDArray[Any]) -> Fitted:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or not array.size:
        raise UnclearError("numbers that are no image: must be (H, W), (H, W, C) or (C, H, W), of 1, 3 or 4 channels")
    kind, values = str(array.dtype), Values()
    if kind == "bool":
        array = array.astype(np.uint8) * 255
    elif kind != "uint8":
        array, values = _to_8_bits(data, array)
    image = Image.fromarray(np.ascontiguousarray(array))
    size, mode = image.size, image.mode if kind == "uint8" else f"{image.mode};{kind}"
    image, box = _cropped(image, data.image_size)
    return Fitted(_squared(data, image, box), size, mode, values)


def _to_8_bits(data: Data, values: NDArray[Any]) -> tuple[NDArray[np.uint8], Values]:
    """Returns values, of any shape, by what is black and white; a block at a time, as a scan may be large."""
    asked = asked_range(data)
    black, white = asked or (data.black, data.white)
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise UnclearError("values that are no numbers")
    if (floating := np.issubdtype(values.dtype, np.floating)) and not np.isfinite(values).all():
        raise UnclearError("values that are no finite numbers")
    low, high = float(values.min()), float(values.max())
    if not asked and (floating or low < 0):
        raise RangeError("floating-point values" if floating else "values below 0", low, high)
    out, clipped = np.empty(values.shape, np.uint8), 0
    rows = max(1, _BLOCK // max(1, values[0].size))
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        clipped += int(((block < black) | (block > white)).sum())
        out[start : start + rows] = grey(block, black, white)
    return out, Values(low, high, values.size, clipped)


def _target(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns the size of an image whose shorter side is resized to `size`."""
    scale = size / min(width, height)
    return max(size, round(width * scale)), max(size, round(height * scale))


def _cropped(image: Image.Image, size: int) -> tuple[Image.Image, Box | None]:
    """Returns an image, and what of it is to be seen. Resized whole, one of 30,000 x 2 pixels would take gigabytes: of
    an elongated image only what is to be seen is kept, and what the filter looks at beside it."""
    width, height = image.size
    if max(width, height) < _ELONGATED * min(width, height):
        return image, None
    outer, box = [], []
    for side, wanted in zip((width, height), _target(width, height, size), strict=True):
        step, before = side / wanted, (wanted - size) // 2
        margin = math.ceil(2 * max(1.0, step)) + 1  # the bicubic filter's reach
        first = max(0, math.floor(before * step) - margin)
        outer.append((first, min(side, math.ceil((before + size) * step) + margin)))
        box.append((before * step - first, (before + size) * step - first))
    (left, right), (top, bottom) = outer
    return image.crop((left, top, right, bottom)), (box[0][0], box[1][0], box[0][1], box[1][1])


def _squared(data: Data, image: Image.Image, box: Box | None) -> Images:
    """Returns an image of at most 8 bits as pixels (C, H, W); `box` is what of it is to be seen, None: its centre."""
    size = data.image_size
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != (wanted := "L" if data.channels == 1 else "RGB"):
        image = image.convert(wanted)
    if box:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    elif image.size != (size, size):
        width, height = _target(*image.size, size)
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
    values: Values = Values()
    pages: int = 0  # pages and frames that are left out
    unclear: str = ""  # why nobody knows what is black and what is white in some of them

    def take(self, place: int, fitted: Fitted, out: Images) -> None:
        """Puts the image that is at a place among those asked for into the array."""
        out[len(self.kept)] = fitted.pixels
        self.kept.append(place)
        self.sizes[fitted.size] += 1
        self.modes[fitted.mode] += 1
        self.values += fitted.values
        self.pages += fitted.pages

    def refuse(self, name: str, error: Exception) -> None:
        """Notes an image that cannot be read."""
        self.broken[name] = _reason(error)
        if isinstance(error, RangeError):
            self.unclear = str(error)
            self.values += Values(error.low, error.high)

    def extent(self) -> str:
        """Returns the smallest and the largest size."""
        low, high = (f(self.sizes, key=lambda s: (s[0] * s[1], s), default=(0, 0)) for f in (min, max))
        return f"{low[0]}x{low[1]}" + (f" to {high[0]}x{high[1]}" if high != low else "")


def nearly_flat(images: Images) -> tuple[int, int]:
    """Returns how many images are nearly all black, and nearly all white: all but one pixel in 200."""
    black = white = 0
    for image in images:  # one at a time: they may be mapped from a disk
        black += int((image <= DARK).mean() > 0.995)
        white += int((image >= 255 - DARK).mean() > 0.995)
    return black, white


def _opened(file: bytes | Path | str) -> IO[bytes]:
    """Returns a file's bytes; text is an address, such as of a hub's file."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    opened: IO[bytes] = file.open("rb") if isinstance(file, Path) else fsspec.open(file, "rb").open()
    return opened


def _fitted(data: Data, file: File) -> Fitted:
    """Returns what is in a file.

    Raises:
        Exception: whatever Pillow's decoders raise on a broken one.
    """
    if file is None:
        raise UnclearError("no image")
    if isinstance(file, UnclearError):
        raise file
    if isinstance(file, np.ndarray):
        return fit(data, file)
    if isinstance(file, Part):
        return file.read(data)
    # Several scans of 200 megapixels at once would be more than a small machine has.
    with _opened(file) as opened:
        try:
            with Image.open(opened) as image, _alone(image):
                return fit(data, image)
        except UnidentifiedImageError:
            opened.seek(0)
            if is_pointer(opened.read(HEAD)):
                raise UnclearError(POINTER) from None
            raise


def _alone(image: Image.Image) -> AbstractContextManager[object]:
    return _one_large if math.prod(image.size) > _LARGE else nullcontext()


def _reason(error: Exception) -> str:
    """Returns what is wrong with an image, with nothing of it, nor its name, in it."""
    if isinstance(error, UnclearError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return "cut off" if "truncated" in str(error).lower() else type(error).__name__


def listed(broken: Mapping[str, str], shown: int = 3) -> list[str]:
    """Returns the first reasons that images cannot be read, and the first names of each."""
    by_reason: dict[str, list[str]] = {}
    for name, why in broken.items():
        by_reason.setdefault(why, []).append(name)
    parts = []
    for why, names in [*by_reason.items()][:shown]:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        parts.append(f"{', '.join(names[:shown])}{more} ({why})")
    return parts


def decode(
    data: Data,
    files: Iterable[File],
    names: Sequence[str],
    origin: str,
    out: Images,
    own_names: Sequence[str] | None = None,
) -> Decoded:
    """Decodes images, in parallel, into the first rows of `out`, shape (N, C, H, W). `own_names` is what the node's own
    log calls them, where that may say more.

    Raises:
        ConfigError: more cannot be read than `data.max-broken` allows; the message counts them and names the first.
            Where that is 1, as no run may have it, all that is wrong is to be seen, and nothing is raised.
    """
    found = Decoded()

    def one(named: tuple[str, File]) -> Fitted | Exception:
        name, file = named
        try:
            return _fitted(data, file)
        except RangeError as error:  # of a kind: one line tells
            return error
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            if data.max_broken == 1:  # a survey, which lists them
                return error
            log.warning("%s: %s cannot be read: %s", origin, name, _reason(error))
            return error

    said = time.monotonic()
    waiting = zip(own_names or names, files, strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        batches = iter(lambda: [*islice(waiting, _AT_A_TIME)], [])
        for i, result in enumerate(chain.from_iterable(pool.map(one, batch) for batch in batches)):
            if isinstance(result, Exception):
                found.refuse(names[i], result)
                continue
            found.take(i, result, out)
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                log.info("%s: %d of %d images decoded", origin, i + 1, len(names))
    problem = f"{origin}: {len(found.broken)} of {len(names)} images cannot be read: {'; '.join(listed(found.broken))}"
    if found.unclear and data.max_broken < 1:  # such images are not broken: they are not to be lost, however few
        raise ConfigError(problem)
    if len(found.broken) > data.max_broken * len(names):
        raise ConfigError(
            f"{problem}; repair or remove them (the node's own log has every name and cause), or raise "
            f"data.max-broken = {data.max_broken:g}, the share that is skipped"
        )
    return found
