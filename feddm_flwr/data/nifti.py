"""NIfTI files (extra `nifti`): the slices of a volume along an axis, as a radiologist looks at them.

A volume is turned to the patient's axes first. Grey is by `data.window-center` and `data.window-width`, else by
`data.black` and `data.white`, else by the file's own display range, else from the volume's smallest to its largest
value, but for one in 200 at either end. Slices with nearly nothing in them are left out.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from feddm_flwr.config.data import Data
from feddm_flwr.data.formats import Contents
from feddm_flwr.data.images import DARK, Fitted, Part, UnclearError, fit
from feddm_flwr.data.intensities import asked_range, grey, spread, square_pixels

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
_one_volume = threading.Lock()  # a thread would read it while another does


def contents(path: Path, data: Data) -> Contents:
    """Returns the slices of a file."""
    try:
        volume = _volume(path)
    except UnclearError as error:
        return Contents([error])
    except Exception:  # nibabel raises nearly anything on broken files
        return Contents([UnclearError("no NIfTI file that can be read")])
    black, white = asked_range(data) or volume.shown or spread(volume.values)
    axis = _AXES[data.slice_axis]
    slices = [Slice(path, i, black, white) for i in range(volume.values.shape[axis])]
    seen = [s for s in slices if (s.grey(volume, axis) > DARK).mean() >= data.slice_content]
    left_out = Counter({"slices with nearly nothing in them": len(slices) - len(seen), **volume.left_out})
    return Contents(seen, left_out=left_out)


@dataclass(frozen=True)
class _Volume:
    """A volume, of which the axes lead to the patient's right, to the front and to the head."""

    values: NDArray[Any]  # (X, Y, Z)
    spacing: tuple[float, ...]  # of the axes, in millimetres
    shown: tuple[float, float] | None  # black and white, where the file says it
    left_out: dict[str, int]


@dataclass(frozen=True)
class Slice(Part):
    """A slice of a NIfTI file."""

    path: Path
    index: int
    black: float
    white: float

    def read(self, data: Data) -> Fitted:
        volume, axis = _volume(self.path), _AXES[data.slice_axis]
        image = self.grey(volume, axis)
        columns, rows = (size for i, size in enumerate(volume.spacing) if i != axis)
        fitted = fit(data, square_pixels(image, rows, columns))
        return replace(fitted, size=image.shape[::-1], mode=f"{fitted.mode};NIfTI")

    def grey(self, volume: _Volume, axis: int) -> NDArray[np.uint8]:
        """Returns the slice with the head, or the front, at the top, and the patient's right, or the front, at the
        left."""
        values = volume.values.take(self.index, axis)
        return np.ascontiguousarray(grey(values, self.black, self.white).T[::-1, ::-1])


def _volume(path: Path) -> _Volume:
    with _one_volume:
        return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # slices come one after the other: of one volume, or two at its end
def _read(path: Path, changed: int) -> _Volume:
    image: Any = nibabel.load(path)
    series = image.shape[3:]  # moments, or directions: they look alike, and only the first is read
    if series:
        image = image.slicer[(slice(None),) * 3 + (0,) * len(series)]
    image = nibabel.as_closest_canonical(image)  # type: ignore[no-untyped-call]
    values = np.asanyarray(image.dataobj)
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise UnclearError("a NIfTI file of colours or complex numbers")
    if values.ndim != 3 or not values.size:
        raise UnclearError("a NIfTI file without a volume")
    low, high = float(image.header["cal_min"]), float(image.header["cal_max"])
    return _Volume(
        values.astype(np.float32) if np.issubdtype(values.dtype, np.floating) else values,
        tuple(float(v) for v in image.header.get_zooms()[:3]),
        (low, high) if low < high else None,
        {"volumes of a series left out": math.prod(series) - 1},
    )
