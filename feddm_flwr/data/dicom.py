"""DICOM files (extra `dicom`): from stored values to 8 bits, as a viewer shows them.

Stored values become the modality's units (Hounsfield, say), and these grey by `data.window-center` and
`data.window-width`, else by `data.black` and `data.white`, else by the file's first window. Where there is none, the
values of a CT are refused, which mean something; others are spread from their smallest to their largest, but for one
in 200 at either end. MONOCHROME1 is inverted. Colours are RGB, whatever they were. Every frame is an image.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.tag import Tag

from feddm_flwr.config.data import Data
from feddm_flwr.data.formats import Contents
from feddm_flwr.data.images import Fitted, Part, RangeError, UnclearError, fit
from feddm_flwr.data.intensities import asked_range, grey, spread, square_pixels
from feddm_flwr.data.source import PATIENT

# A warning may have a patient's data in it; what is wrong with an image shows when it is decoded.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\b")

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_HEADER = ("Rows", "NumberOfFrames", "Modality", PATIENT, *_PIXELS)
_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
_ABOUT: list[int] = [
    Tag(name) for name in ("Modality", "ImagerPixelSpacing", *_GROUPS)
]  # beside what describes the pixels
_NO_IMAGES = {"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN"}  # modalities: what was marked in images, or computed from them
_LEFT_OUT = "DICOM files without an image"


def contents(path: Path, data: Data) -> Contents:
    """Returns the frames of a file."""
    try:
        header = pydicom.dcmread(path, defer_size=1024, specific_tags=[*_HEADER])
        frames = int(header.get("NumberOfFrames") or 1)
    except Exception:  # the reader raises nearly anything on broken files
        return Contents([UnclearError("no DICOM file that can be read")])
    if header.get("Modality") in _NO_IMAGES or not any(name in header for name in _PIXELS):
        return Contents(left_out=Counter([_LEFT_OUT]))
    patient = str(header.get(PATIENT) or "")
    patient = hashlib.sha256(patient.encode()).hexdigest() if patient else ""
    return Contents([Frame(path, i) for i in range(frames)], patient)


@dataclass(frozen=True)
class Frame(Part):
    """A frame of a DICOM file."""

    path: Path
    index: int

    def read(self, data: Data) -> Fitted:
        about = Dataset()
        try:
            values = pixel_array(self.path, ds_out=about, specific_tags=_ABOUT, index=self.index)
        except Exception as error:  # the decoders raise nearly anything
            raise UnclearError("pixels that cannot be decoded") from error
        if values.ndim == 3 or about.PhotometricInterpretation == "PALETTE COLOR":
            image = _colour(values, about)
        else:
            image = _grey(data, values, about, self.index)
            if about.PhotometricInterpretation == "MONOCHROME1":
                image = 255 - image
        height, width = image.shape[:2]
        fitted = fit(data, square_pixels(image, *_spacing(about, self.index)))
        return replace(fitted, size=(width, height), mode=f"{fitted.mode};DICOM")


def _colour(values: NDArray[Any], about: Dataset) -> NDArray[np.uint8]:
    if about.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, about)[..., :3]
        bits = values.dtype.itemsize * 8
    else:
        bits = about.BitsStored
    return grey(values, 0, 2**bits - 1)


def _grey(data: Data, values: NDArray[Any], about: Dataset, index: int) -> NDArray[np.uint8]:
    """Returns stored values as grey."""
    eight_bits = values.dtype == np.uint8
    transform = _of_frame(about, index, "PixelValueTransformationSequence")
    if "RescaleSlope" in transform:
        values = values * float(transform.RescaleSlope) + float(transform.RescaleIntercept)
    else:
        values = apply_modality_lut(values, about)
    if asked := asked_range(data):
        return grey(values, *asked)
    window = _of_frame(about, index, "FrameVOILUTSequence")
    if about.get("VOILUTSequence"):
        bits = about.VOILUTSequence[0].LUTDescriptor[2]
        return grey(apply_voi(values.astype(np.int64), about), 0, 2**bits - 1)
    if window.get("WindowWidth"):
        return _windowed(values, window)
    if eight_bits:
        return values.round().clip(0, 255).astype(np.uint8)
    if about.get("Modality") == "CT":
        raise RangeError("a CT without a window", float(values.min()), float(values.max()))
    return grey(values, *spread(values))


def _windowed(values: NDArray[Any], window: Dataset) -> NDArray[np.uint8]:
    """Returns values as grey by the first window (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    center, width = (_first(window[name].value) for name in ("WindowCenter", "WindowWidth"))
    function = window.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return np.round(255 / (1 + np.exp(-4 * (values - center) / width))).astype(np.uint8)
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-6)
    return grey(values, center - width / 2, center + width / 2)


def _spacing(about: Dataset, index: int) -> tuple[float, float]:
    """Returns the distance of rows and of columns, in millimetres or as a ratio."""
    measures = _of_frame(about, index, "PixelMeasuresSequence")
    found = measures.get("PixelSpacing") or about.get("ImagerPixelSpacing") or about.get("PixelAspectRatio") or (1, 1)
    return float(found[0]), float(found[1])


def _of_frame(about: Dataset, index: int, name: str) -> Dataset:
    """Returns what says something of a frame: a part of its own, one of all frames, or the file."""
    return next(_parts(about, index, name), about)


def _parts(about: Dataset, index: int, name: str) -> Iterator[Dataset]:
    for groups, place in zip(_GROUPS, (index, 0), strict=True):
        if len(of_all := about.get(groups) or ()) > place and (found := of_all[place].get(name)):
            yield found[0]


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, MultiValue) else value)
