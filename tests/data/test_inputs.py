"""What users bring: splits by name, paths of any characters, values of any range, and nothing dropped in silence."""

from __future__ import annotations

import base64
import io
import itertools
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, Array3D, ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image

from feddm_flwr.cli import inspect_data
from feddm_flwr.config import ConfigError, parse
from feddm_flwr.data import images
from feddm_flwr.data.node_data import NodeData, load_all, load_node
from feddm_flwr.data.splits import split_of, splits_in
from feddm_flwr.storage.state_folder import state_root

SHAPE = {"data.image-size": 8, "data.channels": 1}


def encoded(value: int, kind: str = "PNG") -> bytes:
    """A grey image of one value."""
    Image.new("L", (8, 8), value).save(file := io.BytesIO(), kind)
    return file.getvalue()


def picture(path: Path, value: int, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value, kind))


def table(path: Path, values: Sequence[int], **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # as Arrow takes no path that is not UTF-8
        pq.write_table(pa.table({"image": [encoded(value) for value in values], **columns}), file)


def seen(name: str | Path, **keys: Any) -> list[int]:
    """The values of all images that a run would have, in order."""
    given = {"data.name": str(name), **SHAPE, **{f"data.{k.replace('_', '-')}": v for k, v in keys.items()}}
    return sorted(int(image.mean().round()) for image in load_all(parse(given).data)[0])


def own(path: Path, **keys: Any) -> NodeData:
    """A node's own images."""
    config = parse({"data.name": "own", **SHAPE, **{f"data.{k.replace('_', '-')}": v for k, v in keys.items()}})
    return load_node(config.data, config.seed, None, str(path), state_root(None))


def survey(path: Path, nodes: int = 0, **keys: Any) -> str:
    given = {"data.name": str(path), **{k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}}
    return "\n".join(inspect_data.describe(given, nodes, path.parent / "sheet.png"))


# ---- names that mean something


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "train_set", "trainset", "imagesTr", "train2017")),
        *((name, "validation") for name in ("valid", "VALID", "val", "validation", "dev", "Val_images", "eval")),
        *((name, "test") for name in ("test", "Test-Set", "imagesTs", "hold-out", "held_out", "01_test")),
        *((name, "") for name in ("invalid", "validity", "tr", "ts", "testis", "cat", "training shoes", "")),
    ],
)
def test_the_usual_names_of_splits_are_known(name: str, split: str) -> None:
    assert split_of(name) == split


def test_a_split_may_be_anywhere_in_a_file_s_name() -> None:
    assert splits_in("shirts_train") == splits_in("train-00000-of-00002") == splits_in("TrainShirts") == {"train"}
    assert splits_in("x_hold_out") == {"test"}
    assert splits_in("dev_kit_train") == {"validation", "train"}
    assert splits_in("trains_and_tests_of_time") == {"test"}
    assert splits_in("contrasts") == set()


@pytest.mark.parametrize("names", [*itertools.product(("train", "TRAINING"), ("valid", "Val"), ("test", "holdout"))])
def test_only_one_split_is_trained_on(names: tuple[str, ...], tmp_path: Path) -> None:
    for i, split in enumerate(names):
        for k in range(3):
            picture(tmp_path / "top" / split / "ok" / f"{k}.png", 50 * i + k)
            picture(tmp_path / "nested" / "ok" / split / f"{k}.png", 50 * i + k)
            picture(tmp_path / "files" / f"{split}_{k}.png", 50 * i + k)
        table(tmp_path / "tables" / f"shirts_{split}.parquet", range(50 * i, 50 * i + 3))
        table(tmp_path / "shards" / "data" / f"{split}-00000-of-00001.parquet", range(50 * i, 50 * i + 3))
    for kind in ("top", "nested", "files", "tables", "shards"):
        assert seen(tmp_path / kind) == [0, 1, 2], kind
        for i, wanted in enumerate(("train", "valid", "test")):
            assert seen(tmp_path / kind, split=wanted) == [50 * i + k for k in range(3)], (kind, wanted)
        assert len(seen(tmp_path / kind, split="all")) == 9
        with pytest.raises(
            ConfigError, match=r"data.split = 'other': .* has no such split; there are: test, train, val"
        ):
            seen(tmp_path / kind, split="other")
    for kind in ("top", "nested"):
        config = parse({"data.name": str(tmp_path / kind), **SHAPE})
        assert {*load_all(config.data)[1]} == {"ok"}


def test_where_only_some_names_are_splits_nothing_is_guessed(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "car", "bus")):
        picture(tmp_path / "vehicles" / name / "1.png", i)
    table(tmp_path / "tables" / "a_test.parquet", [1])
    table(tmp_path / "tables" / "more.parquet", [2])
    table(tmp_path / "both" / "test_of_train.parquet", [1])
    for kind, there in (("vehicles", "train"), ("tables", "test"), ("both", "test, train")):
        with pytest.raises(
            ConfigError, match=rf"has {there} .*name all splits train, valid or test.*data.split = 'all'"
        ):
            seen(tmp_path / kind)
    config = parse({"data.name": str(tmp_path / "vehicles"), **SHAPE, "data.split": "all"})
    assert sorted(load_all(config.data)[1]) == ["bus", "car", "train"]
    assert seen(tmp_path / "vehicles", split="car") == [1]  # which is said
    with pytest.raises(ConfigError, match=r"'test': .* has no such split; there are: none"):
        seen(tmp_path / "tables" / "more.parquet", split="test")


ODD = ["scans [2024]", "a*b", "q?m", "{a,b}", "per%20c", "hash#x", "-dash", "~", "quo'te\"", "back\\slash", "né", "s p"]


@pytest.mark.parametrize("name", [*ODD, "n" * 255, os.fsdecode(b"M\xfcller")])
def test_a_path_is_a_path(name: str, tmp_path: Path) -> None:
    """No character in it is a pattern: others that would match are not read."""
    table(tmp_path / name / "x.parquet", [1, 2, 3])
    for other in ("axxb", "qxm", "scans 2", "a", "b"):
        table(tmp_path / other / "x.parquet", [100])
    picture(tmp_path / "images" / name / "cat.png", 4)
    for streaming in (False, True):
        assert seen(tmp_path / name, streaming=streaming) == [1, 2, 3]
    assert seen(tmp_path / name / "x.parquet") == [1, 2, 3]
    assert seen(tmp_path / "images" / name) == [4]
    data = own(tmp_path / name)
    assert len(data.train) + len(data.held_out) == 3


def test_a_path_that_the_library_cannot_open_says_so(tmp_path: Path) -> None:
    table(tmp_path / "a::b" / "x.parquet", [1])
    with pytest.raises(ConfigError, match=r"a path with :: cannot be read; rename"):
        seen(tmp_path / "a::b")


# ---- what lies there is read


def test_what_a_hub_and_the_library_leave_is_read(tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})

    def made(values: Sequence[int]) -> Dataset:
        cells = [{"bytes": encoded(value), "path": None} for value in values]
        return Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(len(values))]}, features)

    made([1, 2]).to_parquet(tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "snapshot" / "README.md").write_text("# shirts")
    made([1, 2]).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": made([1, 2]), "test": made([3])}).save_to_disk(tmp_path / "dict")
    (tmp_path / "raw").mkdir()
    with pa.OSFile(str(tmp_path / "raw" / "x.arrow"), "wb") as sink:
        rows = made([1, 2]).data.table
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    for kind in ("snapshot", "saved", "dict", "raw"):
        assert seen(tmp_path / kind) == [1, 2], kind
        assert load_all(parse({"data.name": str(tmp_path / kind), **SHAPE}).data)[1] == ["a", "b"]
        assert len(own(tmp_path / kind, eval_fraction=0.0).train) == 2
    assert seen(tmp_path / "dict", split="test") == [3]
    for config in ("one", "two"):
        table(tmp_path / "several" / config / "x.parquet", [1])
    with pytest.raises(ConfigError, match="parquet or arrow files in several folders"):
        seen(tmp_path / "several")
    picture(tmp_path / "snapshot" / "assets" / "logo.png", 9)
    with pytest.raises(
        ConfigError, match=r"1 images and 1 parquet or arrow files below it; name the folder or the file"
    ):
        seen(tmp_path / "snapshot")


def test_paths_in_a_table_start_at_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (1, 2):
        picture(tmp_path / "set" / "img" / f"{value}.png", value)
        picture(tmp_path / "elsewhere" / "img" / f"{value}.png", 100)
    monkeypatch.chdir(tmp_path / "elsewhere")
    pq.write_table(pa.table({"image": ["img/1.png", "img/2.png"]}), tmp_path / "set" / "x.parquet")
    assert seen(tmp_path / "set") == [1, 2]
    assert seen(tmp_path / "set", streaming=True) == [1, 2]
    assert "passed over" not in survey(tmp_path / "set", data__image_size=8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_base64_is_read_and_never_said(
    kind: str, head: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = [head + base64.b64encode(encoded(value, kind)).decode() for value in (10, 20)]
    pq.write_table(pa.table({"image": text}), tmp_path / "x.parquet")
    assert seen(tmp_path) == [10, 20]
    secret = base64.b64encode(b"a patient " * 500).decode()
    pq.write_table(pa.table({"image": [head + secret, f"/scans/{secret[:20]}.png"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"2 of 2 images cannot be read: row 0 \(.*; row 1 \(.*\)") as error:
        seen(tmp_path)
    said = capfd.readouterr()
    for text_of in (str(error.value), caplog.text, said.out, said.err):
        assert secret[:20] not in text_of


def arrays() -> NDArray[np.uint8]:
    return np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_pixels_in_lists_are_what_they_say(streaming: bool, tmp_path: Path) -> None:
    grey = arrays()
    colour = np.stack([grey, 255 - grey, grey // 2], -1)
    shapes: dict[str, tuple[Any, Any]] = {
        "int64": (List(List(Value("int64"))), grey.astype(int)),
        "uint8": (List(List(Value("uint8"))), grey),
        "Array2D": (Array2D((8, 8), "uint8"), grey),
        "int16 tensor": (Array2D((8, 8), "int16"), grey),
        "channels last": (Array3D((8, 8, 3), "uint8"), colour),
        "channels first": (List(List(List(Value("int32")))), colour.transpose(0, 3, 1, 2).astype(int)),
    }
    for name, (kind, values) in shapes.items():
        file = tmp_path / name / "x.parquet"
        file.parent.mkdir()
        Dataset.from_dict({"image": [*values]}, Features({"image": kind})).to_parquet(file)
        channels = 3 if "channels" in name else 1
        keys = {"data.name": str(file), "data.image-size": 8, "data.channels": channels, "data.streaming": streaming}
        read = load_all(parse(keys).data)[0]
        assert (read == (colour.transpose(0, 3, 1, 2) if channels == 3 else grey[:, None])).all(), name


def test_numbers_whose_range_nobody_knows_ask_for_it(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for name, values in (("unit", ramp), ("signed", (ramp * 4000 - 1000).round().astype(int))):
        pq.write_table(pa.table({"image": [values.tolist()] * 3}), tmp_path / f"{name}.parquet")
    for name, why in (("unit", "floating-point values"), ("signed", "values below 0")):
        with pytest.raises(ConfigError, match=rf"3 of 3 images cannot be read: .* \({why}: data.black and data.white"):
            seen(tmp_path / f"{name}.parquet", max_broken=0.9)
    expected = (ramp * 255).round()
    for name, black, white in (("unit", 0.0, 1), ("signed", -1000, 3000)):
        keys = {"data.name": str(tmp_path / f"{name}.parquet"), **SHAPE, "data.black": black, "data.white": white}
        assert np.abs(load_all(parse(keys).data)[0][0, 0] - expected).max() <= 1
    with pytest.raises(ConfigError, match=r"data.black = 5 with data.white = 5: must be less"):
        parse({"data.black": 5, "data.white": 5})


def test_cells_that_are_no_images_say_what_they_are(tmp_path: Path) -> None:
    rows: dict[str, tuple[list[Any], str]] = {
        "ragged": ([[[1, 2], [3]]], "the rows are of different lengths"),
        "flat": ([[1, 2, 3]], "must be (H, W)"),
        "none": ([None, encoded(1)], "no image"),
        "several": ([[encoded(1), encoded(2)]], "one file a row"),
    }
    for name, (cells, why) in rows.items():
        pq.write_table(pa.table({"image": cells}), tmp_path / f"{name}.parquet")
        with pytest.raises(ConfigError, match="images cannot be read: row 0 ") as error:
            seen(tmp_path / f"{name}.parquet")
        assert why in str(error.value)
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ConfigError, match=r"data.image-column = 'image': .* holds int64 there; must hold images"):
        seen(tmp_path / "numbers.parquet")


# ---- values that mean something


def test_signed_and_floating_point_files_ask_for_their_range(tmp_path: Path) -> None:
    ramp = np.linspace(-1000, 3000, 64).round().astype(np.int32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ct.tif")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ConfigError, match=r"ct.tif \(values below 0: data.*; float.tif \(floating-point values: data"):
        seen(tmp_path)
    keys = {"data.name": str(tmp_path), **SHAPE, "data.black": -1000, "data.white": 3000}
    read = load_all(parse(keys).data)[0]
    assert np.abs(read[:, 0] - (ramp + 1000) * (255 / 4000)).max() <= 1
    said = survey(tmp_path, data__image_size=8, data__black=-900, data__white=3000)
    assert "values   -1000 to 3000; data.black=-900 data.white=3000, beyond which 3.1% are clipped" in said
    assert "note     percent of the values are clipped by data.black or data.white: 3" in said
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ConfigError, match=r"float.tif \(values that are no finite numbers\)"):
        load_all(parse(keys).data)


def test_a_survey_tells_what_would_be_white(tmp_path: Path) -> None:
    ramp = np.linspace(0, 4000, 64).round().astype(np.uint16).reshape(8, 8)
    for i in range(4):
        (tmp_path / "scans").mkdir(exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / "scans" / f"{i}.png")
    said = survey(tmp_path / "scans", data__image_size=8)
    assert "data.white=4095 would fit: the largest value is 4000" in said
    assert "note     images nearly all black: 4" in said
    assert own(tmp_path / "scans").remarks == {"images nearly all black": 4}
    assert own(tmp_path / "scans", white=4095).remarks == {}
    assert "would fit" not in survey(tmp_path / "scans", data__image_size=8, data__white=4095)


def test_a_survey_of_images_that_no_run_can_have_is_an_error_that_says_all(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "scans" / "a.tif")
    with pytest.raises(ConfigError, match=r"(?s)0 of .* 1 more .*values   0.5 to 0.5.*data.black and data.white must"):
        survey(tmp_path / "scans", data__image_size=8)


# ---- nothing is dropped in silence


def test_an_image_is_known_by_its_content_and_others_are_counted(tmp_path: Path) -> None:
    for i, name in enumerate(("a.jpg", "b.jfif", "IM0001", "c.jpg_large", "d.JPE")):
        picture(tmp_path / "set" / name, 40 * i, "JPEG")
    for name in ("e.HEIC", "f.heic", "g.john smith", "h.txt", "notes"):
        (tmp_path / "set" / name).write_bytes(b"\0\0\0\x18ftypheic")
    assert seen(tmp_path / "set") == [0, 40, 80, 120, 160]
    passed_over = {
        "files passed over, .heic": 2,
        "files passed over, .txt": 1,
        "files passed over, other": 1,  # it may be a name
        "files passed over, no ending": 1,
    }
    assert passed_over.items() <= own(tmp_path / "set").remarks.items()
    said = survey(tmp_path / "set", data__image_size=8)
    assert "note     files passed over, .heic: 2" in said
    assert "smith" not in said
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.heic").write_bytes(b"DICM")
    with pytest.raises(ConfigError, match=r"no images below this folder, .* there are: 1 .heic"):
        seen(tmp_path / "none")


def test_pages_and_frames_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for name in ("stack.tif", "moving.gif", "moving.webp", "moving.png"):
        frames = [Image.new("L", (8, 8), 60 * k) for k in range(4)]
        (tmp_path / "set").mkdir(exist_ok=True)
        frames[0].save(tmp_path / "set" / name, save_all=True, append_images=frames[1:])
    assert own(tmp_path / "set").remarks["pages or frames left out"] == 12
    assert "note     pages or frames left out: 12" in survey(tmp_path / "set", data__image_size=8)


def test_a_second_column_of_images_and_rows_without_one_are_said(tmp_path: Path) -> None:
    cells = [encoded(100), encoded(120), None]
    pq.write_table(pa.table({"image": cells, "mask": [encoded(200)] * 3, "age": [1, 2, 3]}), tmp_path / "x.parquet")
    said = survey(tmp_path / "x.parquet", data__image_size=8)
    assert "images   2 of 8x8, 1 more cannot be read" in said
    assert "broken row 2 (no image)" in said
    assert "note     columns with images that are not read: 1" in said
    assert seen(tmp_path / "x.parquet", image_column="mask") == [200] * 3


# ---- sizes


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 3000), (3000, 2), (1, 50), (700, 100), (100, 799)])
def test_an_elongated_image_is_what_resizing_and_cropping_it_would_give(width: int, height: int) -> None:
    smooth = np.linspace(0, 255, width)[None] * np.linspace(0.2, 1, height)[:, None]
    image = Image.fromarray(smooth.round().astype(np.uint8))
    data = parse({"data.name": "own", "data.image-size": 32, "data.channels": 1}).data
    scale = 32 / min(width, height)
    wide, high = max(32, round(width * scale)), max(32, round(height * scale))
    left, top = (wide - 32) // 2, (high - 32) // 2
    whole = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    assert np.abs(images.fit(data, image).pixels[0].astype(int) - np.asarray(whole)).max() <= 1


def test_the_memory_for_an_elongated_image_is_that_of_what_is_seen(tmp_path: Path) -> None:
    """Enlarged whole, it would take 60,000 x 512 x 512 / 2 bytes."""
    picture(tmp_path / "a.png", 100)
    Image.fromarray(np.full((2, 60_000), 100, np.uint8)).save(tmp_path / "strip.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = parse({"data.name": str(tmp_path), "data.image-size": 512, "data.channels": 1})
    assert load_all(config.data)[0].mean() == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_a_scan_of_200_megapixels_is_read(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000), 1).save(tmp_path / "scan.png")
    picture(tmp_path / "small.png", 255)
    assert seen(tmp_path) == [255, 255]


# ---- classes


def test_a_label_of_several_classes_is_refused_whatever_the_shares(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", range(12), label=[[i % 3] if i % 4 else [1, 2] for i in range(12)])
    for partition in ("iid", "dirichlet", "pathological", "shard"):
        config = parse({"data.name": str(tmp_path), **SHAPE, "data.partition": partition})
        with pytest.raises(ConfigError, match=r"data.label-column = 'label': .* has lists in this column"):
            load_node(config.data, 0, (0, 2), None, state_root(None))
    assert len(seen(tmp_path, label_column="")) == 12
    assert len(own(tmp_path, label_column="").train) == 10


def test_many_classes_are_summed_up(tmp_path: Path) -> None:
    names = [f"patient {i:040d}" for i in range(300)]
    table(tmp_path / "x.parquet", [1] * 301, label=[*names, names[7]])
    said = survey(tmp_path / "x.parquet", data__image_size=8)
    line = next(line for line in said.splitlines() if line.startswith("classes"))
    assert line.startswith("classes  300 of them: patient 0000000000000000000000000000000… 2, ")
    assert len(line) < 400
    config = parse({"data.name": str(tmp_path / "x.parquet"), **SHAPE})
    assert len(load_node(config.data, 0, (0, 1), None, state_root(None)).class_counts) == 300


def test_more_classes_than_can_be_told_are_one_number(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", [1] * 12_000, label=[f"{i:05d}" for i in range(12_000)])
    config = parse({"data.name": str(tmp_path / "x.parquet"), **SHAPE})
    data = load_node(config.data, 0, (0, 1), None, state_root(None))
    assert (data.class_counts, data.classes) == ({}, [])
    assert data.remarks["classes, too many to count one by one (see data.label-column)"] == 12_000


def test_labels_of_bytes_and_without_a_number_are_classes(tmp_path: Path) -> None:
    table(tmp_path / "bytes.parquet", [1, 2], label=[b"cat", b"dog"])
    table(tmp_path / "floats.parquet", [1, 2], label=[1.0, float("nan")])
    for name, classes in (("bytes", ["cat", "dog"]), ("floats", ["1.0", "unlabelled"])):
        config = parse({"data.name": str(tmp_path / f"{name}.parquet"), **SHAPE})
        assert load_all(config.data)[1] == classes


def test_a_share_that_cannot_be_dealt_says_what_would_do(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path / "x.parquet", range(24), label=[i % 2 for i in range(24)])
    keys = {"data.name": str(tmp_path / "x.parquet"), **SHAPE, "data.partition": "dirichlet"}
    with pytest.raises(ConfigError) as error:
        load_node(parse({**keys, "data.alpha": 0.05}).data, 0, (0, 12), None, state_root(None))
    said = re.fullmatch(
        r"data.partition = 'dirichlet' for 12 nodes and 24 images \(.*\): data.alpha = 0.05 leaves a node fewer than 2 "
        r"images; ([0-9]+) nodes would do",
        str(error.value),
    )
    assert said
    would_do = int(said[1])
    shares = [
        load_node(parse({**keys, "data.alpha": 0.05}).data, 0, (i, would_do), None, state_root(None))
        for i in range(would_do)
    ]
    assert sum(len(share.train) + len(share.held_out) for share in shares) == 24
    with pytest.raises(ConfigError, match=r"data.alpha = 0.05 .*; data.alpha = [0-9.]+ would do"):
        load_node(parse({**keys, "data.alpha": 0.05}).data, 0, (0, 8), None, state_root(None))
    assert not [warning for warning in recwarn if "partition" in str(warning.message)]
