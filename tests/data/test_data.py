"""Data: partitions, folders, parquet, and clear words about what cannot be used."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from feddm_flwr.cli import inspect_data
from feddm_flwr.config import ConfigError, RunConfig, parse
from feddm_flwr.data import images, node_data, readers, sources
from feddm_flwr.data.cells import file_of
from feddm_flwr.data.node_data import NodeData, load_all, load_node
from feddm_flwr.storage.state_folder import state_root

OWN = parse({"data.name": "own", "data.image-size": 8, "data.channels": 1})  # of a node, by its data-path


def of_classes(names: str) -> RunConfig:
    return parse({"data.name": "own", "data.image-size": 8, "data.channels": 1, "data.classes": names})


def node(index: int, count: int, **keys: Any) -> NodeData:
    return load(parse({k.replace("__", "."): v for k, v in keys.items()}), (index, count), None)


def load(config: RunConfig, partition: tuple[int, int] | None, path: str | None) -> NodeData:
    return load_node(config.data, config.seed, partition, path, state_root(None))


def both(data: NodeData) -> list[bytes]:
    return [image.tobytes() for image in np.concatenate([data.train, data.held_out])]


@pytest.mark.parametrize(("partition", "lost"), [("iid", 0), ("dirichlet", 0), ("shard", 7)])
def test_partitions_share_out_every_image_once(partition: str, lost: int) -> None:
    """Shards are of equal size: fewer images than there are shards remain."""
    nodes = [node(i, 4, data__partition=partition) for i in range(4)]
    everything = Counter(image.tobytes() for image in load_all(parse({}).data)[0])
    shared = Counter(b for n in nodes for b in both(n))
    assert shared <= everything
    assert (everything - shared).total() <= lost
    for n in nodes:
        assert sum(n.class_counts.values()) == len(n.train) + len(n.held_out)
        assert n.train.dtype == np.uint8
        assert n.train.shape[1:] == (1, 8, 8)


@pytest.mark.parametrize(("count", "each", "copies"), [(4, 3, {1, 2}), (5, 2, {1}), (10, 2, {2}), (3, 2, {0, 1})])
def test_pathological_nodes_hold_few_classes_and_every_class_as_many_nodes(
    count: int, each: int, copies: set[int]
) -> None:
    keys: dict[str, Any] = {"data__partition": "pathological", "data__classes-per-node": each}
    nodes = [node(i, count, **keys) for i in range(count)]
    assert {len(n.class_counts) for n in nodes} == {each}
    everything, shared = Counter(load_all(parse({}).data)[1]), Counter[str]()
    held = Counter(dict.fromkeys(everything, 0))
    for n in nodes:
        shared.update(n.class_counts)
        held.update([*n.class_counts])
    assert {*held.values()} == copies
    assert all(shared[c] == everything[c] for c in shared)  # no image of a class that is held is left out


def test_dirichlet_is_more_skewed_for_smaller_alpha() -> None:
    def skew(alpha: float) -> float:
        counts = [node(i, 4, data__partition="dirichlet", data__alpha=alpha).class_counts for i in range(4)]
        return float(np.mean([max(c.values()) / sum(c.values()) for c in counts]))

    assert skew(0.1) > skew(100.0) + 0.1


def test_partitions_depend_on_the_seed_and_on_nothing_else() -> None:
    node_data._load_node.cache_clear()
    first = both(node(1, 4, data__partition="dirichlet"))
    node_data._load_node.cache_clear()
    assert both(node(1, 4, data__partition="dirichlet")) == first
    assert both(node(1, 4, data__partition="dirichlet", seed=1)) != first


def test_digits_are_those_of_scikit_learn() -> None:
    whole = [load_all(parse({"data.split": split}).data)[0] for split in ("train", "test")]
    ours = Counter(image.tobytes() for image in np.concatenate(whole))
    theirs = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert ours == Counter(image.tobytes() for image in theirs)


def test_digits_keep_a_test_split() -> None:
    train, labels, _ = load_all(parse({}).data)
    test, _, _ = load_all(parse({"data.split": "test"}).data)
    assert (len(train), len(test)) == (1438, 359)
    assert len(labels) == len(train)
    assert train.max() == 255


def test_one_image_is_always_trained_on() -> None:
    assert len(node(0, 400, **{"data__eval-fraction": 0.99}).train) >= 1


@pytest.mark.parametrize(
    ("keys", "count", "said"),
    [
        ({}, 2000, "for 2000 nodes and 1438 images (data.name = 'digits'): more partitions than images"),
        ({}, 1438, "1 images are too few"),
        ({"data__partition": "pathological", "data__classes-per-node": 11}, 4, "data.partition = 'pathological'"),
        ({"data__partition": "natural", "data__natural-column": "writer"}, 4, "data.natural-column = 'writer'"),
        (
            {"data__partition": "natural", "data__natural-column": "label"},
            11,
            "'label' has 10 different values; use as many nodes",
        ),
        ({"data__partition": "dirichlet", "data__label-column": "digit"}, 4, "data.label-column = 'digit'"),
        ({"data__split": "validation"}, 4, "has no such split; there are: test, train"),
    ],
)
def test_impossible_partitions_say_why(keys: dict[str, Any], count: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        node(0, count, **keys)
    assert said in str(caught.value)


SHAPE = {"data.name": "own", "data.image-size": 16, "data.channels": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of mixed size, mode and kind in two class folders."""
    random = np.random.default_rng(0)
    for i, (mode, size) in enumerate([("RGB", (20, 30)), ("L", (16, 16)), ("RGBA", (64, 40)), ("P", (9, 9))] * 3):
        place = tmp_path / "images" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(place / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_a_folder_of_mixed_images_is_one_array(folder: Path) -> None:
    data = load(parse(SHAPE), None, str(folder))
    assert data.train.shape[1:] == (3, 16, 16)
    assert len(data.train) + len(data.held_out) == 12
    assert load(parse({**SHAPE, "data.channels": 1}), None, str(folder)).train.shape[1:] == (1, 16, 16)


def test_a_folder_can_be_partitioned(folder: Path) -> None:
    config = parse({**SHAPE, "data.name": str(folder), "data.partition": "pathological", "data.classes-per-node": 1})
    assert [sorted(load(config, (i, 2), None).class_counts) for i in range(2)] == [["cat"], ["dog"]]


def test_resizing_keeps_the_centre(tmp_path: Path) -> None:
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 12:52] = 255  # the centre square and a little more
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).save(tmp_path / "b.png")
    assert load(parse(SHAPE), None, str(tmp_path)).train.min() >= 240


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white on top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name, exif=exif)
    pixels = load(parse(SHAPE), None, str(tmp_path)).train[0]
    assert pixels[:, :8].max() == 0
    assert pixels[:, 8:].min() == 255


def test_broken_images_are_counted_and_named(folder: Path) -> None:
    (folder / "cat" / "torn.png").write_bytes((folder / "cat" / "1.png").read_bytes()[:60])
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        load(parse({**SHAPE, "data.name": str(folder)}), (0, 2), None)
    said = str(caught.value)
    assert re.search(r"[12] of 7 images cannot be read: (cat/torn|dog/empty)", said)


def test_a_few_broken_images_are_skipped_and_counted(tmp_path: Path) -> None:
    for i in range(200):
        Image.new("L", (16, 16), i).save(tmp_path / f"{i:03d}.png")
    huge = b"P5 100000 100000 255 "  # a decompression bomb: ten gigabytes, it says
    for name, content in (("007.png", b""), ("100.pgm", huge), ("150.png", b"no image")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    data = load(parse({**SHAPE, "data.max-broken": 0.02, "data.eval-fraction": 0.1}), None, str(tmp_path))
    assert (data.skipped, len(data.train) + len(data.held_out)) == (3, 198)
    assert {int(image.max()) for image in (*data.train, *data.held_out)} == {*range(200)} - {7, 150}
    with pytest.raises(
        ConfigError, match=r"3 of 201 images cannot be read: .* or raise data.max-broken = 0.01, the share"
    ):
        load(parse(SHAPE), None, str(tmp_path))


def test_a_node_does_not_tell_the_names_of_its_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cat" / "jane-doe.png").write_bytes(b"")
    pattern = r"1 of 13 images cannot be read: file 7 in order of name \(no image that Pillow knows\)"
    with pytest.raises(ConfigError, match=pattern) as said:
        load(parse(SHAPE), None, str(folder))
    assert "jane" not in str(said.value)
    assert "jane-doe.png" in caplog.text


def test_a_path_of_a_node_is_never_looked_up_elsewhere() -> None:
    for name in ("digits", "uoft-cs/cifar10"):
        with pytest.raises(ConfigError, match=f"data-path = '{name}': no such file or folder"):
            load(parse(SHAPE), None, name)


def test_a_node_with_images_of_its_own_is_not_taken_for_one_of_the_demo(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.name = 'digits' but this node has a data-path"):
        load(parse({}), None, str(folder))


def test_every_mode_is_read_as_a_viewer_would_show_it(tmp_path: Path) -> None:
    grey = np.full((16, 16), 200, np.uint8)
    Image.fromarray(np.full((16, 16), 200 * 257, np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "cmyk.tif")
    clear = np.zeros((16, 16, 4), np.uint8)  # black that is not to be seen
    Image.fromarray(clear).save(tmp_path / "rgba.png")
    Image.fromarray(clear).convert("LA").save(tmp_path / "la.png")
    Image.fromarray(grey > 0).save(tmp_path / "one.png")
    data = load(parse({**SHAPE, "data.eval-fraction": 0.0}), None, str(tmp_path))
    assert sorted(int(image.mean()) for image in data.train) == [200, 200, 200, 255, 255, 255]
    twelve = load(parse({**SHAPE, "data.eval-fraction": 0.0, "data.white": 51400}), None, str(tmp_path))
    assert sorted(int(image.mean()) for image in twelve.train) == [200, 200, 255, 255, 255, 255]


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(
        ConfigError,
        match=r"1 of 1 images cannot be read: file 1 .*floating-point values: data.black and data.white must say",
    ):
        load(parse({**SHAPE, "data.eval-fraction": 0.0}), None, str(tmp_path))


def test_images_are_decoded_once_and_anew_when_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget() -> NodeData:  # as another process would find it
        node_data._load_own.cache_clear()
        sources.open_source.cache_clear()
        return load(parse(SHAPE), None, str(folder))

    first = both(forget())
    with monkeypatch.context() as patched:
        patched.setattr(images.Image, "open", lambda file: pytest.fail("decoded again"))
        assert both(forget()) == first
    Image.new("RGB", (16, 16), "white").save(folder / "cat" / "1.png")
    assert both(forget()) != first


def test_a_node_s_own_folders_are_told_only_where_the_run_names_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They may be called after patients."""
    data = load(parse(SHAPE), None, str(folder))
    assert (data.class_counts, data.classes) == ({}, [])
    assert load(parse({**SHAPE, "data.classes": "cat,dog,emu"}), None, str(folder)).class_counts == {"cat": 6, "dog": 6}
    with pytest.raises(ConfigError, match=r"must name every class; .* 1 more, which the node's own log") as error:
        load(parse({**SHAPE, "data.classes": "cat"}), None, str(folder))
    assert "dog" not in str(error.value)
    assert "dog" in caplog.text


def test_labels_are_places_in_the_federation_s_classes(folder: Path) -> None:
    keys = {**SHAPE, "model.class-conditional": True, "data.eval-fraction": 0.0}
    read = load(parse({**keys, "data.classes": "bird, dog,cat"}), None, str(folder))
    assert sorted(read.train_labels) == [1] * 6 + [2] * 6
    with pytest.raises(ConfigError, match=r"data.classes = 'bird,dog': must name every class; .* also has cat"):
        load(parse({**keys, "data.name": str(folder), "data.classes": "bird,dog"}), (0, 2), None)


def test_a_split_is_a_subfolder_or_files_of_that_name_and_never_ignored(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 3)):
        for i in range(count):
            place = tmp_path / "folder" / split / "cat"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, count, 0)).save(place / f"{i}.png")
    keys = {**SHAPE, "data.name": str(tmp_path / "folder")}
    assert len(load_all(parse(keys).data)[0]) == 4
    assert len(load_all(parse({**keys, "data.split": "test"}).data)[0]) == 3
    assert load_all(parse({**keys, "data.split": "test"}).data)[1] == ["cat"] * 3
    with pytest.raises(ConfigError, match=r"data.split = 'val': .* has no such split; there are: test, train"):
        load_all(parse({**keys, "data.split": "val"}).data)
    with pytest.raises(ConfigError, match=r"data.split = 'test': .* has no such split; there are: none"):
        load_all(parse({**keys, "data.name": str(tmp_path / "folder" / "train"), "data.split": "test"}).data)


def test_rows_without_a_class_are_a_class_of_their_own(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["round", "square"])})
    rows = {"image": [Image.new("RGB", (16, 16))] * 3, "label": [1, -1, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    found = load_all(parse({**SHAPE, "data.name": str(tmp_path / "x.parquet")}).data)[1]
    assert found == ["square", "unlabelled", "unlabelled"]
    keys = {**SHAPE, "data.name": str(tmp_path / "x.parquet"), "data.eval-fraction": 0.0}
    chosen = parse({**keys, "data.partition": "pathological", "data.classes-per-node": 1})
    assert sorted(str(load(chosen, (i, 2), None).class_counts) for i in range(2)) == [
        "{'square': 1}",
        "{'unlabelled': 2}",
    ]


def test_an_image_at_an_address_is_fetched(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://hub/a.png", "wb") as file:
        Image.new("RGB", (16, 16), "white").save(file, "png")
    out = np.zeros((2, 3, 16, 16), np.uint8)
    config = parse({**SHAPE, "data.max-broken": 0.6})
    cells = [{"bytes": None, "path": f"memory://hub/{name}.png"} for name in "ab"]
    found = images.decode(config.data, [file_of(c, [], lambda: np.asarray) for c in cells], ["a", "b"], "here", out)
    assert (found.kept, found.broken) == ([0], {"b": "FileNotFoundError"})
    assert out[0].min() == 255


@pytest.mark.parametrize(("side", "size"), [(75, 72), (28, 28), (300, 256)])
def test_what_is_guessed_of_images_is_a_size_that_the_model_takes(side: int, size: int, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (side, side)).save(tmp_path / "images" / "a.png")
    keys = {"data.name": str(tmp_path / "images"), "model.preset": "cifar10-32-small"}
    lines = inspect_data.describe(keys, 0, tmp_path / "data.png")
    assert f"guessed  data.image-size={size} data.channels=1" in lines


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["round", "square"])})
    images = [Image.new("RGB", (16, 16), (i, i, i)) for i in range(10)]
    rows = {"picture": images, "kind": [i % 2 for i in range(10)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    keys = {
        **SHAPE,
        "data.name": str(tmp_path / "x.parquet"),
        "data.image-column": "picture",
        "data.label-column": "kind",
    }
    data = load(parse(keys), (0, 2), None)
    assert set(data.class_counts) == {"round", "square"}
    assert len(data.train) + len(data.held_out) == 5
    with pytest.raises(ConfigError, match=r"data.image-column = 'image': no such column; .* has \['picture', 'kind'\]"):
        load(parse({**keys, "data.image-column": "image"}), (0, 2), None)
    with pytest.raises(ConfigError, match=r"no such column; .*: the node's own log says which there are") as told:
        load(parse({**keys, "data.image-column": "image"}), None, str(tmp_path / "x.parquet"))
    assert "picture" not in str(told.value)
    with pytest.raises(ConfigError, match=r"data.image-column = 'kind': .* holds int64 there; must hold images"):
        load(parse({**keys, "data.image-column": "kind"}), (0, 2), None)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "missing.parquet"])
def test_missing_paths_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"data-path = '{name}': no such file or folder"):
        load(parse(SHAPE), None, name)


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images below this folder"):
        load(parse(SHAPE), None, str(tmp_path))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(parse({**SHAPE, "data.name": str(tmp_path / "x.parquet")}), (0, 2), None)


def write_parquet(path: Path, count: int, broken: int) -> None:
    """Grey images of two classes, one of which cannot be read."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    cells = []
    for i in range(count):
        Image.new("L", (9, 9), 8 * i).save(file := io.BytesIO(), "PNG")
        cells.append({"bytes": b"no image" if i == broken else file.getvalue(), "path": None})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"image": cells, "label": [i % 3 for i in range(count)]}, features=features).to_parquet(path)


def test_a_stream_gives_every_node_the_images_that_a_table_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "some.parquet"
    write_parquet(file, 30, broken=7)
    keys = {"data.name": str(file), "data.image-size": 8, "data.channels": 1, "data.max-broken": 0.1}
    for shared in (keys, {**keys, "data.partition": "pathological", "data.classes-per-node": 1}):
        for i in range(3):
            table, stream = (
                load(parse({**shared, "data.streaming": streaming}), (i, 3), None) for streaming in (False, True)
            )
            assert both(table) == both(stream)
            assert table.class_counts == stream.class_counts
            assert table.skipped == stream.skipped
    assert "row 7 cannot be read: no image that Pillow knows" in caplog.text
    unlabelled = {**keys, "data.label-column": "none", "data.streaming": True}
    assert len(load(parse(unlabelled), (0, 3), None).train) == 9


def test_a_nodes_own_parquet_is_copied_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    write_parquet(tmp_path / "some.parquet", 30, broken=-1)
    assert len(load(OWN, None, str(tmp_path / "some.parquet")).train) == 27
    assert not (tmp_path / "hub").exists()
    assert not [*state_root(None).rglob("*.arrow")]


def test_what_a_killed_process_had_decoded_is_removed(folder: Path) -> None:
    config = parse({"data.name": str(folder), "data.image-size": 8, "data.channels": 3})
    cache = state_root(None) / "cache"
    load(config, (0, 2), None)
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    left = cache / f".writing-{entry.name}-x"
    entry.rename(left)
    node_data._load_node.cache_clear()
    load(config, (0, 2), None)
    assert entry.exists()
    assert not left.exists()


def test_a_survey_shows_what_there_is_and_guesses_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (folder / "dog" / "broken.png").write_bytes(b"no image")
    sheet = tmp_path / "out" / "sheet.png"
    said = "\n".join(inspect_data.describe({"data.name": str(folder), "data.partition": "shard"}, 2, sheet))
    assert re.search(r"images   \d+ of \d+x\d+ to \d+x\d+, 1 more cannot be read", said)
    assert "broken dog/broken.png (no image that Pillow knows)" in said
    assert "a run would refuse them" in said
    assert "data.image-size=" in said
    assert "data.channels=3" in said
    assert "node-1" in said
    for path in (sheet, tmp_path / "out" / "sheet-nodes.png"):
        with Image.open(path) as image:
            assert min(image.size) > 30


def pictures(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / name)


def test_linked_classes_are_read_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    pictures(site, ["cats/a.png", "cats/.thumbnails/a.png", ".Trash-1000/files/old.png", "$RECYCLE.BIN/old.png"])
    pictures(site, ["#recycle/old.png", "@eaDir/a.png", "cats/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg"])
    pictures(elsewhere, ["b.png", "c.png"])
    (site / "dogs").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(site)
    assert load(of_classes("cats,dogs"), None, str(site)).class_counts == {"cats": 1, "dogs": 2}
    before = sources.stamp_of(str(site), "")
    pictures(elsewhere, ["d.png"])
    assert sources.stamp_of(str(site), "") != before


def test_a_split_beside_what_a_disk_has_of_its_own_is_one_and_beside_images_is_not(tmp_path: Path) -> None:
    disk, mixed = tmp_path / "disk", tmp_path / "mixed"
    pictures(disk, ["train/cat/a.png", "train/dog/b.png", "$RECYCLE.BIN/c.png", "lost+found/d.png"])
    assert load(of_classes("cat,dog"), None, str(disk)).class_counts == {"cat": 1, "dog": 1}
    pictures(mixed, ["a.png", "b.png", "c.png", "train/d.png"])
    with pytest.raises(ConfigError, match=r"has train beside others, .* data.split = 'all' takes everything"):
        load(OWN, None, str(mixed))
    data = load(
        parse({"data.name": "own", "data.image-size": 8, "data.channels": 1, "data.split": "all"}), None, str(mixed)
    )
    assert len(data.train) + len(data.held_out) == 4


def test_which_images_of_its_own_a_node_holds_out_does_not_depend_on_its_number(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{i}.png" for i in range(20)])
    one, other = (load(OWN, partition, str(tmp_path)) for partition in ((0, 2), (1, 3)))
    assert both(one) == both(other)


def test_what_is_held_out_stays_so_when_images_come_and_go(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(100)]
    pictures(tmp_path, names)
    before = load(OWN, None, str(tmp_path))
    (tmp_path / names[7]).unlink()
    Image.new("L", (8, 8), 200).save(tmp_path / "000-new.png")
    after = load(OWN, None, str(tmp_path))
    was_trained_on = {image.tobytes() for image in before.train}
    assert sum(image.tobytes() in was_trained_on for image in after.held_out) <= 1
    assert len(before.held_out) == len(after.held_out) == 10


def test_no_name_of_a_nodes_file_is_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jane_doe.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match="cannot be read") as parquet:
        load(OWN, None, str(tmp_path))
    pictures(tmp_path / "folder", ["john_smith/scan.png"])

    is_file = Path.is_file

    def locked(path: Path) -> bool:
        if path.suffix != ".png":
            return is_file(path)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", locked)
    with pytest.raises(ConfigError, match=r"folder': cannot be read .Permission denied.") as folder:
        load(OWN, None, str(tmp_path / "folder"))
    assert "jane" not in str(parquet.value)
    assert "john" not in str(folder.value)


def test_pixels_of_many_bits_mean_what_their_format_says(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "b.tif")
    black_is_low = bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0])  # PhotometricInterpretation = 1
    written = (tmp_path / "b.tif").read_bytes()
    assert written.count(black_is_low) == 1
    (tmp_path / "c.tif").write_bytes(written.replace(black_is_low, black_is_low[:8] + b"\0\0"))
    own = parse({"data.name": "own", "data.image-size": 16, "data.channels": 1, "data.white": 40_000})
    whole = replace(own.data, white=65535)
    fitted = [images.fit(whole, Image.open(tmp_path / name)).pixels for name in ("b.tif", "c.tif")]
    assert (fitted[0] == 255 - fitted[1]).all()
    twelve = (ramp // 16).astype(">u2").tobytes()
    (tmp_path / "d.pgm").write_bytes(b"P5\n16 16\n4095\n" + twelve)
    for white in (4095, 65535):
        pgm = images.fit(replace(own.data, white=white), Image.open(tmp_path / "d.pgm")).pixels
        assert np.abs(pgm.astype(int) - fitted[0]).max() <= 1


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path, ["benign/a.png", "benign/b.png", "malignant/c.png", "lost+found/d.png"])
    assert load(of_classes("benign,malignant"), None, str(tmp_path)).class_counts == {"benign": 2, "malignant": 1}
    scandir = os.scandir

    def locked(path: Any) -> Any:
        if str(path).endswith("malignant"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\), or a folder below it") as error:
        load(OWN, None, str(tmp_path))
    assert "malignant" not in str(error.value)


def test_a_state_folder_among_the_images_changes_nothing(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{i}.png" for i in range(4)])
    first = load_node(OWN.data, OWN.seed, None, str(tmp_path), tmp_path / "state")
    (tmp_path / "notes.csv").write_text("more every day")
    assert load_node(OWN.data, OWN.seed, None, str(tmp_path), tmp_path / "state") is first


def test_splits_beside_other_folders_of_images_are_not_taken_for_classes(tmp_path: Path) -> None:
    pictures(tmp_path, ["train/a.png", "train/b.png", "test/c.png", "__MACOSX/._a.png"])
    (tmp_path / "._x.parquet").write_bytes(b"a Mac's")
    data = load(OWN, None, str(tmp_path))
    assert len(data.train) + len(data.held_out) == 2
    pictures(tmp_path, ["more/d.png"])
    with pytest.raises(ConfigError, match="has test, train beside others, so that it is not clear what to train on"):
        load(OWN, None, str(tmp_path))


def test_a_link_to_an_image_is_not_another_image(tmp_path: Path) -> None:
    pictures(tmp_path, [f"all/{i}.png" for i in range(20)])
    (tmp_path / "picked").mkdir()
    for i in range(10):
        (tmp_path / "picked" / f"{i}.png").symlink_to(tmp_path / "all" / f"{i}.png")
    data = load(OWN, None, str(tmp_path))
    assert len({*both(data)}) == len(both(data)) == 20


def test_names_of_other_encodings_and_of_macs_are_read(tmp_path: Path) -> None:
    pictures(tmp_path, [unicodedata.normalize("NFD", "Ärzte") + "/a.png", "dogs/b.png"])
    (tmp_path / "dogs/b.png").rename(os.fsdecode(os.fsencode(tmp_path / "dogs") + b"/M\xfcller.png"))
    keys = {"data.name": "own", "data.image-size": 8, "data.channels": 1, "model.class-conditional": True}
    data = load(parse({**keys, "data.classes": "Ärzte,dogs"}), None, str(tmp_path))
    assert data.class_counts == {"dogs": 1, unicodedata.normalize("NFC", "Ärzte"): 1}


def test_what_goes_wrong_while_a_stream_is_read_is_not_blamed_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "some.parquet", 30, broken=-1)

    def broken_off(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(readers, "decode", broken_off)
    keys = {"data.name": str(tmp_path / "some.parquet"), "data.image-size": 8, "data.channels": 1}
    with pytest.raises(ConfigError, match=r"some.parquet': cannot be read \(TimeoutError\)"):
        load(parse({**keys, "data.streaming": True}), (0, 3), None)
