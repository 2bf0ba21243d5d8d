"""Medical images and files with several images: what is seen of each, whose it is, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from local_grid import config, nodes, run
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from feddm_flwr.cli.main import main
from feddm_flwr.config import ConfigError, RunConfig, parse
from feddm_flwr.data import files
from feddm_flwr.data.images import Images
from feddm_flwr.data.node_data import NodeData, load_all, load_node

KEYS = {"data.image-size": 8, "data.channels": 1, "data.flip": False}


def parsed(name: str, **keys: Any) -> RunConfig:
    return parse({**KEYS, "data.name": name, **{"data." + key.replace("_", "-"): v for key, v in keys.items()}})


def load(folder: Path, **keys: Any) -> NodeData:
    c = parsed("own", **keys)
    return load_node(c.data, c.seed, None, str(folder), folder.parent / "root")


def seen(folder: Path, **keys: Any) -> Images:
    return load_all(parsed(str(folder), **keys).data)[0]


def save_dicom(path: Path, values: NDArray[Any], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
    ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, pydicom.uid.generate_uid()
    ds.Modality, ds.PatientID, ds.PhotometricInterpretation, ds.SamplesPerPixel = "MR", "P1", "MONOCHROME2", 1
    ds.Rows, ds.Columns = values.shape[-2:]
    ds.BitsAllocated = ds.BitsStored = values.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(values.dtype.kind == "i")
    if values.ndim == 3:
        ds.NumberOfFrames = len(values)
    ds.PixelData = values.tobytes()
    for name, value in more.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)


def item(**of: Any) -> Dataset:
    made = Dataset()
    for name, value in of.items():
        setattr(made, name, value)
    return made


RAMP = np.arange(-1000, 1048, 32, dtype=np.int16).reshape(8, 8)


def ramp(black: float, white: float, values: NDArray[Any] = RAMP) -> NDArray[np.uint8]:
    return np.round((values - black) / (white - black) * 255).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("header", "keys", "expected"),
    [
        ({"WindowCenter": 40.5, "WindowWidth": 401}, {}, ramp(-160, 240)),
        ({"WindowCenter": [40.5, 1], "WindowWidth": [401, 2]}, {}, ramp(-160, 240)),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"}, {}, ramp(-160, 240)),
        (
            {"WindowCenter": 40.5, "WindowWidth": 401, "PhotometricInterpretation": "MONOCHROME1"},
            {},
            255 - ramp(-160, 240),
        ),
        (
            {"WindowCenter": 40.5, "WindowWidth": 401, "RescaleSlope": 2, "RescaleIntercept": -100},
            {},
            ramp(-160, 240, RAMP * 2.0 - 100),
        ),
        ({"WindowCenter": 0, "WindowWidth": 10}, {"window_center": 40.0, "window_width": 400.0}, ramp(-160, 240)),
        ({"WindowCenter": 0, "WindowWidth": 10}, {"black": -160.0, "white": 240.0}, ramp(-160, 240)),
        (
            {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"},
            {},
            np.round(255 / (1 + np.exp(-4 * (RAMP - 40.0) / 400))).astype(np.uint8),
        ),
        ({}, {}, ramp(*np.percentile(RAMP, [0.5, 99.5]))),
    ],
)
def test_grey_is_what_a_viewer_shows(
    header: Mapping[str, Any], keys: Mapping[str, Any], expected: NDArray[np.uint8], tmp_path: Path
) -> None:
    save_dicom(tmp_path / "images" / "one", RAMP, **header)  # with no ending, as many archives have them
    (image,) = seen(tmp_path / "images", **keys)
    np.testing.assert_array_equal(image[0], expected)


def test_each_frame_has_a_window_and_a_scale_of_its_own(tmp_path: Path) -> None:
    def group(center: float, slope: float) -> Dataset:
        window = item(WindowCenter=center + 0.5, WindowWidth=401)
        scale = item(RescaleSlope=slope, RescaleIntercept=0)
        return item(FrameVOILUTSequence=[window], PixelValueTransformationSequence=[scale])

    frames = {"PerFrameFunctionalGroupsSequence": [group(0, 1), group(100, 2)]}
    save_dicom(tmp_path / "images" / "a.dcm", np.stack([RAMP, RAMP]), **frames)
    first, second = seen(tmp_path / "images")
    np.testing.assert_array_equal(first[0], ramp(-200, 200))
    np.testing.assert_array_equal(second[0], ramp(-100, 300, RAMP * 2))


def test_a_ct_without_a_window_is_refused_by_the_names_of_the_keys(tmp_path: Path) -> None:
    for i in range(2):
        save_dicom(tmp_path / "images" / f"{i}.dcm", RAMP, Modality="CT")
    with pytest.raises(ConfigError, match=r"a CT without a window: .*data\.window-center"):
        load(tmp_path / "images")


def test_compression_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    same = ("", "_RLE", "_jp2klossless", "_jpeg_ls_lossless", "_bigendian", "_implicit")
    for name in same:
        (folder / f"{name or 'plain'}.dcm").write_bytes(
            Path(str(get_testdata_file(f"MR_small{name}.dcm"))).read_bytes()
        )
    images = seen(folder, image_size=64)
    assert len(images) == len(same)
    assert all((image == images[0]).all() for image in images)
    assert images[0].std() > 30


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", 1, (255, 0, 0)),  # JPEG lossless
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 1, (254, 0, 0)),  # YBR_FULL_422
        ("SC_rgb_rle_16bit_2frame.dcm", 2, (255, 0, 0)),
        ("examples_ybr_color.dcm", 30, None),
        ("examples_palette.dcm", 1, None),
    ],
)
def test_colours_are_rgb(name: str, count: int, first: tuple[int, ...] | None, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(Path(str(get_testdata_file(name))).read_bytes())
    images = seen(tmp_path / "images", channels=3, image_size=96)
    assert len(images) == count
    assert images[0].std() > 10
    if first:
        assert tuple(images[0][:, 2, 48]) == first


def test_pixels_become_square(tmp_path: Path) -> None:
    values = np.zeros((8, 16), np.uint8)
    values[:, :8] = 255
    save_dicom(tmp_path / "images" / "a.dcm", values, PixelSpacing=[2.0, 1.0])
    (image,) = seen(tmp_path / "images", image_size=16)
    assert (image[0][:, :7] == 255).all()
    assert (image[0][:, 9:] == 0).all()


def test_patients_stay_together_and_nothing_of_them_is_written(tmp_path: Path) -> None:
    values = {}
    for i in range(40):
        values[i] = patient = f"Mustermann-{i % 8}"
        save_dicom(tmp_path / "images" / f"{i:02}.dcm", np.full((8, 8), i, np.uint8), PatientID=patient)
    found = load(tmp_path / "images", group_column="PatientID", eval_fraction=0.2)
    sides = [{values[int(image.flat[0])] for image in images} for images in (found.train, found.held_out)]
    assert not sides[0] & sides[1]
    assert len(found.groups) == len(sides[0])
    written = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"Mustermann" in path.read_bytes()]
    Image.new("L", (8, 8)).save(tmp_path / "images" / "x.png")
    with pytest.raises(ConfigError, match="not all images are DICOM files that name their patient"):
        load(tmp_path / "images", group_column="PatientID")


def save_volume(path: Path, values: NDArray[Any], axes: str = "RAS", spacing: float = 1.0) -> None:
    """Saves a volume whose axes lead right, to the front and to the head, with its memory in another order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, spacing, 1.0])
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    turned = nibabel.orientations.apply_orientation(values, turn)
    nibabel.save(nibabel.Nifti1Image(turned, affine @ inv_ornt_aff(turn, values.shape)), path)


@pytest.mark.parametrize("axes", ["RAS", "LPI", "ASR", "SLP"])
def test_slices_are_seen_as_a_radiologist_sees_them(axes: str, tmp_path: Path) -> None:
    volume = np.zeros((8, 8, 8), np.int16)
    volume[6:, 6:, 6:] = 1000  # right, front, head
    save_volume(tmp_path / "images" / "a.nii.gz", volume, axes)
    corner = np.zeros((8, 8), np.uint8)
    corner[:2, :2] = 255  # the patient's right, or front, at the left; front, or head, at the top
    for axis in ("axial", "coronal", "sagittal"):
        images = seen(tmp_path / "images", slice_axis=axis)
        assert len(images) == 2  # nothing is in the others
        assert all((image[0] == corner).all() for image in images)


def test_a_volumes_slices_stay_together_and_thick_ones_keep_their_shape(tmp_path: Path) -> None:
    for i in range(6):
        volume = np.full((8, 8, 4), 40 * (i + 1), np.uint8)
        save_volume(tmp_path / "images" / f"{i}.nii", volume, spacing=2.0)
    keys = {"black": 0.0, "white": 255.0}
    found = load(tmp_path / "images", eval_fraction=0.2, **keys)
    sides = [{int(image.flat[0]) for image in images} for images in (found.train, found.held_out)]
    assert sorted(len(side) for side in sides) == [2, 4]
    assert not sides[0] & sides[1]
    assert found.groups == (4, 4, 4, 4)
    images = seen(tmp_path / "images", slice_axis="coronal", **keys)
    assert images.shape == (48, 1, 8, 8)


def test_series_and_empty_slices_are_counted(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).random((8, 8, 5, 3)).astype(np.float32)
    volume[:, :, 0] = 0
    volume[0, 0, 1] = np.nan
    for i in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "images" / f"{i}.nii")
    found = load(tmp_path / "images")
    assert len(found.train) == len(found.held_out) == 4
    assert found.remarks["slices with nearly nothing in them"] == 2
    assert found.remarks["volumes of a series left out"] == 4


def test_pages_are_images_where_the_run_asks_for_them(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pages = [Image.new("L", (8, 8), 10 * i) for i in range(1, 5)]
    for name in ("a", "b"):
        pages[0].save(tmp_path / "images" / f"{name}.tiff", save_all=True, append_images=pages[1:])
    assert load(tmp_path / "images").remarks["pages or frames left out"] == 6
    found = load(tmp_path / "images", pages="all")
    assert sorted(int(image.flat[0]) for image in found.train) == [10, 20, 30, 40]  # of one file, in either order
    assert "pages or frames left out" not in found.remarks


def test_a_folder_may_mix_them_with_rubbish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    for i in range(3):
        save_dicom(folder / f"{i}.dcm", np.full((8, 8), 50, np.uint8))
    for name in ("reportsi.dcm", "rtplan.dcm", "liver_1frame.dcm", "MR_truncated.dcm"):
        (folder / name).write_bytes(Path(str(get_testdata_file(name))).read_bytes())
    save_volume(folder / "v.nii", np.full((8, 8, 2), 90, np.uint8))
    Image.new("L", (8, 8), 20).save(folder / "p.png")
    Image.new("L", (8, 8), 30).save(folder / "t.tif")
    for name in ("broken.nii.gz", "notes.docx", "broken.dcm"):
        (folder / name).write_bytes(b"rubbish")
    arguments = ["data", str(folder), "-c", "data.black=0.0 data.white=100.0", "-o", str(tmp_path / "sheet.png")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "images   7 of 8x8" in said
    assert "3 more cannot be read" in said
    assert "DICOM files without an image: 3" in said  # a report, a plan, and what was marked in an image
    for line in (
        "broken.nii.gz (no NIfTI file",
        "broken.dcm (no DICOM file",
        "MR_truncated.dcm (pixels that cannot be",
    ):
        assert line in said
    found = load(folder, max_broken=0.5, eval_fraction=0.0, black=0.0, white=100.0)
    assert len(found.train) == 7
    assert found.skipped == 3


def test_a_federation_trains_on_what_a_hospital_has(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("MR_small.dcm", "MR_small_RLE.dcm", "CT_small.dcm"):
        (folder / name).write_bytes(Path(str(get_testdata_file(name))).read_bytes())
    volume = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    (folder / volume.name).write_bytes(volume.read_bytes())
    (folder / "notes.docx").write_bytes(b"rubbish")
    shown = {"black": 0.0, "white": 5000.0, "image_size": 16, "channels": 1, "eval_fraction": 0.2}
    c = config(**{f"data__{key}": value for key, value in shown.items()}, data__name=str(folder), min_nodes=2)
    done = run(c, nodes(c, 2))
    assert [(one.clients_ok, one.failures) for one in done] == [(2, {})] * 2
    assert all(np.isfinite([one.train_loss, one.eval_loss]).all() for one in done)


def test_without_its_library_a_format_is_passed_over_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dicom(tmp_path / "images" / "a.dcm", RAMP)
    monkeypatch.setattr(files, "_THERE", set())
    with pytest.raises(ConfigError, match=r"no images .* 1 \.dcm; pip install 'feddm-flwr\[dicom\]' reads them"):
        load(tmp_path / "images")
    for i in range(2):
        Image.new("L", (8, 8), i).save(tmp_path / "images" / f"{i}.png")
    assert load(tmp_path / "images").remarks["files passed over, .dcm"] == 1


def test_two_ways_to_say_what_is_black_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.window-width = 400 with data\.black = -100"):
        parse({"data.window-width": 400.0, "data.black": -100.0})
    with pytest.raises(ConfigError, match=r"data\.window-center = 40 with data\.window-width = 0"):
        parse({"data.window-center": 40.0})
