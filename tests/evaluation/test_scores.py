"""Figures of image quality: they equal the textbook's, and say what they depend on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from feddm_flwr.cli import trained_model
from feddm_flwr.cli.main import main
from feddm_flwr.config import ConfigError, parse
from feddm_flwr.data.node_data import load_all
from feddm_flwr.evaluation import features, scores
from feddm_flwr.evaluation.memorization import nearest_images
from feddm_flwr.models import pipelines
from feddm_flwr.models.networks import build


def normal(seed: int, count: int, size: int = 12) -> torch.Tensor:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, size)) @ random.standard_normal((size, size)) + random.standard_normal(size)
    return torch.from_numpy(mixed.astype(np.float32))


def test_fid_is_the_textbook_s() -> None:
    a, b = normal(0, 500), normal(1, 300)
    of_a, of_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(of_a @ of_b)
    expected = float((a.double().mean(0) - b.double().mean(0)).square().sum()) + np.trace(of_a + of_b - 2 * root.real)
    assert scores.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert scores.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_estimate() -> None:
    a, b = normal(0, 80), normal(1, 80)
    x, y = a.double().numpy(), b.double().numpy()
    kernels = [(p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y))]
    within = sum((k.sum() - np.trace(k)) / (80 * 79) for k in kernels[:2])
    expected = within - 2 * kernels[2].mean()
    figures = scores.compare(a, b, 0)  # subsets of all 80 are all the same
    assert figures["kid"] == pytest.approx(expected, rel=1e-3)
    assert figures["kid_std"] is None


def test_precision_and_recall_tell_what_is_missing() -> None:
    real = torch.cat([normal(0, 200), normal(0, 200) + 50])
    half = normal(2, 100) * 0 + real[:100] + 0.01  # one of two modes
    precision, recall = scores.precision_and_recall(real, half)
    assert precision == 1
    assert 0.1 < recall <= 0.5
    assert scores.precision_and_recall(real, real + 500) == (0, 0)


def test_a_floor_is_there_where_the_real_images_suffice() -> None:
    figures = scores.compare(normal(0, 400), normal(0, 400)[:100], 0)
    halves = scores.frechet(*normal(0, 400).split(200))
    assert halves / 3 < figures["fid_floor"] < 3 * halves  # of as many images, shared out at random
    assert "fid_floor" not in scores.compare(normal(0, 150), normal(0, 100), 0)
    assert figures == scores.compare(normal(0, 400), normal(0, 400)[:100], 0)


def test_a_classifier_tells_its_classes_apart_and_is_the_same_each_time(tmp_path: Path) -> None:
    images, classes, _ = load_all(parse({}).data)
    first = features.recipe("classifier", 1, lambda: (images, classes), tmp_path / "one").build()
    assert float(first.name.partition(", ")[2].partition("%")[0]) > 90
    second = features.recipe("classifier", 1, lambda: (images, classes), tmp_path / "two").build()
    assert torch.equal(first(images[:50]), second(images[:50]))
    with pytest.raises(ConfigError, match="'classifier': needs images of two classes or more; use random"):
        features.recipe("classifier", 1, lambda: (images, []), tmp_path)


def test_dinov2_is_read_from_a_folder_and_grey_images_are_fit_to_it(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=224)
    Dinov2Model(config).save_pretrained(tmp_path)
    images, classes, _ = load_all(parse({}).data)
    network = features.recipe("dinov2", 1, lambda: (images, classes), tmp_path, str(tmp_path))
    (tmp_path / "features.safetensors").write_bytes(network.bytes())  # as nodes get it
    network, again = network.build(), features.read(tmp_path / "features.safetensors").build()
    assert network(images[:3]).shape == (3, 16)
    assert torch.equal(network(images[:3]), again(images[:3]))
    assert network.resize == "antialiased bicubic to 224x224"
    with pytest.raises(ConfigError, match=r"features = 'dinov2': .*cannot be read"):
        features.recipe("dinov2", 1, lambda: (images, classes), tmp_path, str(tmp_path / "nothing"))


def test_a_model_is_evaluated_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse({"model.preset": "tiny"})
    pipelines.save(build(config, {}), config, {}, tmp_path / "model", "")
    line = ["evaluate", str(tmp_path), "-n", "40", "--steps", "3", "-o", str(tmp_path / "out" / "scores.json")]
    assert main(line) == 0
    said = capsys.readouterr().out
    for text in (
        "FID  ",
        "KID  ",
        "features   classifier (trained",
        "samples    40 (seed 0, 3 steps of unipc",
        "split train",
        "IS  ",
        "coverage   0.",
    ):
        assert text in said
    assert "warning    FID of fewer than 10000 samples" in said
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["fid"] > 10 * written["fid_floor"]  # noise
    assert main([*line[:-2], "-c", "data.image-size=16"]) == 2
    assert "its images are (1, 16, 16), the model's (1, 8, 8)" in capsys.readouterr().err


def test_copies_of_real_images_make_mifid_worse_than_fid() -> None:
    torch.manual_seed(0)
    real = torch.rand(400, 64) - 0.5
    fresh, copies = torch.rand(200, 64) - 0.5, real[:5].repeat(40, 1)
    honest, copied = (scores.compare(real, fake, 0, memorization=True) for fake in (fresh, copies))
    assert honest["mifid"] == pytest.approx(honest["fid"], rel=1e-3)
    assert copied["mifid"] > 1e6 * copied["fid"]
    assert "mifid" not in scores.compare(real, fresh, 0)


def test_a_site_compares_with_images_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse({"model.preset": "tiny"})
    pipelines.save(build(config, {}), config, {}, tmp_path / "model", "")
    drawn = trained_model.draw(tmp_path / "model", trained_model.How("", 3, None, 0), 40)
    random = np.random.default_rng(0)
    for i in range(60):  # of another size than the model's, which was given these samples back, and noise beside
        pixels = drawn[i] if i < 20 else random.integers(0, 256, (1, 8, 8)).astype(np.uint8)
        (tmp_path / "own").mkdir(exist_ok=True)
        Image.fromarray(np.kron(pixels[0], np.ones((2, 2), np.uint8))).save(tmp_path / "own" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    line = ["evaluate", str(tmp_path / "model"), "-n", "40", "--steps", "3", "--against", str(tmp_path / "own")]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "features   random (an untrained network" in said  # no classes are known
    copies = re.search(r"copies     (\d+) samples are near to an image; by chance 0 are", said)
    assert copies
    assert 10 <= int(copies[1]) <= 30
    with Image.open("nearest.png") as sheet:
        assert sheet.width > 4 * sheet.height
    assert main([*line[:-1], "nowhere"]) == 2
    assert "--against = 'nowhere': no such file or folder" in capsys.readouterr().err


def test_samples_are_near_to_images_by_more_than_images_are_to_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    images, fresh = (torch.randn(5000, 4, generator=generator) for _ in range(2))  # in more than one part
    found = nearest_images(fresh[:1000], images)
    assert 2 <= found.copies <= 30
    assert found.by_chance == 10
    assert (found.distances > 0).all()
    copied = nearest_images(images[4990:], images)
    assert copied.copies == 10
    assert copied.places.tolist() == [*range(4990, 5000)]
