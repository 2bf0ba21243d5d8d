"""Inputs on which other tools were reported to fail; each test names the report."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, PngImagePlugin
from test_inputs import SHAPE, encoded, own, picture, seen, survey, table

from feddm_flwr.config import ConfigError, parse
from feddm_flwr.config.data import Data
from feddm_flwr.data import node_data, sources
from feddm_flwr.data.images import Images
from feddm_flwr.data.source import Source
from feddm_flwr.storage.state_folder import state_root


def test_what_systems_and_notebooks_leave_is_no_image(tmp_path: Path) -> None:
    """pytorch/vision #2831, OpenNeuroOrg/openneuro #2520, pytorch/vision #79."""
    for value in (1, 2):
        picture(tmp_path / "cat" / f"{value}.png", value)
        picture(tmp_path / ".ipynb_checkpoints" / f"{value}.png", 90)
        picture(tmp_path / "cat" / ".ipynb_checkpoints" / f"{value}-checkpoint.png", 90)
        (tmp_path / "cat" / f"._{value}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "cat" / "._1.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / ".DS_Store").write_bytes(bytes(9))
    (tmp_path / "cat" / "Thumbs.db").write_bytes(bytes(9))
    assert seen(tmp_path) == [1, 2]
    said = survey(tmp_path)
    assert "classes  cat 2\n" in said
    assert "files passed over, .db: 1" in said


@pytest.mark.parametrize(
    ("before", "after"),
    [(struct.pack(">II", 1, 1), struct.pack(">II", 1, 0)), (b"Exif\0\0", b"Exif\0\1"), (b"MM\0*", b"MMxx")],
)
def test_an_image_with_a_broken_exif_is_an_image(before: bytes, after: bytes, tmp_path: Path) -> None:
    """python-pillow/Pillow #8605 and #8348, huggingface/datasets #8173."""
    exif = Image.Exif()
    exif[0x0112], exif[282] = 6, 1.0  # turned, and a resolution
    Image.new("L", (8, 8), 9).save(file := io.BytesIO(), "JPEG", exif=exif)
    assert before in file.getvalue()
    (tmp_path / "x.jpg").write_bytes(file.getvalue().replace(before, after))
    assert seen(tmp_path) == [9]


def test_text_and_profiles_of_megabytes_are_passed_over(tmp_path: Path) -> None:
    """python-pillow/Pillow #5610 and #8363, KatherLab/STAMP #76."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2**22, zip=True)
    Image.new("L", (8, 8), 3).save(tmp_path / "text.png", pnginfo=text)
    Image.new("L", (8, 8), 4).save(tmp_path / "profile.png", icc_profile=bytes(2**22))
    assert seen(tmp_path) == [3, 4]


def test_what_is_wrong_with_a_file_is_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """modelscope/ms-swift #3275, eg4000/SKU110K_CVPR19 #28: which images, and why, and no traceback."""
    for value in range(20):
        picture(tmp_path / f"{value:02}.jpg", 12 * value, "JPEG")
    cut = (tmp_path / "03.jpg").read_bytes()
    (tmp_path / "03.jpg").write_bytes(cut[:-20])
    (tmp_path / "04.jpg").write_bytes(b"<html>404 Not Found</html>")
    (tmp_path / "05.jpg").write_bytes(b"")
    said = survey(tmp_path)
    assert "broken 03.jpg (cut off)" in said
    assert "broken 04.jpg, 05.jpg (no image that Pillow knows)" in said
    assert not caplog.text  # once is enough
    with pytest.raises(ConfigError, match=r"3 of 20 images cannot be read: 03.jpg \(cut off\); 04.jpg, 05.jpg \(no im"):
        seen(tmp_path)


@pytest.mark.parametrize(
    ("name", "column"), [("list.csv", "image"), ("list.TSV", "image"), ("metadata.jsonl", "file_name"), ("a.json", "x")]
)
def test_a_list_of_images_and_classes_is_a_table(name: str, column: str, tmp_path: Path) -> None:
    """huggingface/datasets #4814 and #6777: the usual ways to give images their classes without moving them."""
    for value in (1, 2, 3):
        picture(tmp_path / "img" / f"{value}.png", value)
    rows = [{column: f"img/{value}.png", "label": ["ill", "well"][value % 2]} for value in (1, 2, 3)]
    tab = "," if name.endswith("csv") else "\t"
    if ".json" in name:
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "\n".join([f"{column}{tab}label", *(tab.join(row.values()) for row in rows)])
    (tmp_path / name).write_text(text)
    assert seen(tmp_path / name, image_column=column) == [1, 2, 3]
    for streaming in (False, True):
        data = own(tmp_path / name, image_column=column, classes="ill,well", streaming=streaming)
        assert data.class_counts == {"ill": 1, "well": 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_a_table_has_paths_of_are_decoded_anew_when_one_changes(streaming: bool, tmp_path: Path) -> None:
    for value in (1, 2, 3):
        picture(tmp_path / "img" / f"{value}.png", value)
    Dataset.from_dict({"image": [f"img/{value}.png" for value in (1, 2, 3)]}).to_parquet(tmp_path / "x.parquet")

    def there() -> list[int]:  # to another process
        node_data._load_own.cache_clear()
        node_data._kept.cache_clear()
        data = own(tmp_path / "x.parquet", streaming=streaming)
        return sorted(int(image.max()) for image in (*data.train, *data.held_out))

    assert there() == there() == [1, 2, 3]
    picture(tmp_path / "img" / "1.png", 50)  # the table is as it was
    assert there() == there() == [2, 3, 50]
    assert not list(state_root(None).glob("tmp*"))


@pytest.mark.parametrize("name", ["x.zip", "shard-000.tar", "x.npz", "x.png"])
def test_another_file_is_told_what_it_may_be(name: str, tmp_path: Path) -> None:
    """huggingface/datasets #5463: archives, which other tools unpack."""
    (tmp_path / name).write_bytes(encoded(1))
    with pytest.raises(ConfigError, match="is a file that is no table; must be parquet, arrow, csv, tsv, json or jso"):
        seen(tmp_path / name)


@pytest.mark.parametrize("pair", [("images", "masks"), ("train_images", "train_masks"), ("imagesTr", "labelsTr")])
@pytest.mark.parametrize("above", ["", "patient 1/"])
def test_masks_beside_images_are_not_trained_on(pair: tuple[str, str], above: str, tmp_path: Path) -> None:
    for name in pair:
        picture(tmp_path / f"{above}{name}" / "x.png", 7)
    with pytest.raises(ConfigError, match="has folders of images, and others of masks or labels, which would be trai"):
        seen(tmp_path)
    assert seen(tmp_path / f"{above}{pair[0]}") == [7]
    assert seen(tmp_path, split="all") == [7, 7]


def test_classes_called_mask_are_classes(tmp_path: Path) -> None:
    for name in ("with_mask", "without_mask", "mask"):
        picture(tmp_path / name / "x.png", 7)
    assert seen(tmp_path) == [7, 7, 7]


def test_labels_below_zero_are_no_class(tmp_path: Path) -> None:
    """huggingface/datasets: a test split of which nobody may know the labels has -1."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    cells = [{"bytes": encoded(value), "path": None} for value in range(4)]
    Dataset.from_dict({"image": cells, "label": [-1, 0, 1, -1]}, features).to_parquet(tmp_path / "x.parquet")
    assert "classes  a 1, b 1, unlabelled 2" in survey(tmp_path / "x.parquet")


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    """policy-gradient/GRPO-Zero #1, jinnovation/rainy-image-dataset #2: a clone without git-lfs has them for files."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "x.parquet").write_bytes(pointer)
    with pytest.raises(
        ConfigError, match=r"x\.parquet': a pointer of Git LFS: git lfs pull puts the file in its place"
    ):
        seen(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"1 of 1 images cannot be read: x.png \(a pointer of Git LFS: git lfs pull"):
        seen(tmp_path)


def test_the_subsets_of_a_hub_s_data_set_are_named(tmp_path: Path) -> None:
    """huggingface/datasets #2703 and #6533. A folder in the place of a repository, which the library takes as one."""
    for value, subset in enumerate(("full", "mini")):
        table(tmp_path / subset / "train.parquet", [value])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: full, data_files: full/*}\n- {config_name: mini, data_files: mini/*}\n---\n"
    )

    def values(**keys: object) -> list[int]:
        data = parse({"data.name": "a/b", **SHAPE, **keys}).data
        source = sources._tables(data, str(tmp_path), "data.name = 'a/b'", None, "stamp", [])
        return [int(image.max()) for image in images_of(source, data)]

    for wrong in ({}, {"data.subset": "tiny"}):
        with pytest.raises(
            ConfigError, match=r"data\.subset = '.*': must be one of 'full', 'mini', which data\.name ="
        ):
            values(**wrong)
    assert values(**{"data.subset": "mini"}) == [1]
    assert values(**{"data.subset": "mini", "data.streaming": True}) == [1]
    with pytest.raises(ConfigError, match=r"data\.subset = 'mini': is for a data set of a hub"):
        seen(tmp_path / "mini", subset="mini")


def images_of(source: Source, data: Data) -> Images:
    out = np.empty((len(source.table), data.channels, data.image_size, data.image_size), np.uint8)
    source.decode(range(len(out)), out)
    return out


def test_reading_what_is_here_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/datasets #6088 and #1818: the library tells its makers of every table, and waits where it cannot."""
    table(tmp_path / "x.parquet", [1, 2])
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **_: asked.append(given) or [])
    for streaming in (False, True):
        assert seen(tmp_path / "x.parquet", streaming=streaming) == [1, 2]
    assert len(own(tmp_path / "x.parquet").train) == 1
    assert not asked
