"""A model's folder in diffusers of other versions, the oldest that installs beside our torch among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from local_grid import config

from feddm_flwr.models import networks, pipelines, pretrained

DRAW = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "peft")))  # of another time than an old diffusers
import numpy, torch
from diffusers import DiffusionPipeline
for name in ("pixel", "latent", "class", "latent-class"):
    trusted = {"trust_remote_code": True} if "class" in name else {}
    pipeline = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", **trusted)
    asked = {"classes": [1, 2]} if trusted else {"batch_size": 2}
    random = torch.Generator().manual_seed(0)
    images = pipeline(**asked, num_inference_steps=4, generator=random, output_type="np").images
    numpy.save(f"{sys.argv[2]}/{name}.npy", images)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=4, norm_num_groups=4
    ).save_pretrained(folder / "autoencoder")
    latent = {"model__kind": "ldm", "data__image_size": 16, "model__autoencoder": str(folder / "autoencoder")}
    for name, keys in (
        ("pixel", {}),
        ("latent", latent),
        ("class", {"model__class_conditional": True}),
        ("latent-class", {**latent, "model__class_conditional": True}),
    ):
        c = config(**keys)
        assets = pretrained.fetch(c, folder / "assets") if "latent" in name else {}
        pipelines.save(networks.build(c, assets), c, assets, folder / name, "")
    return folder


def drawn(models: Path, to: Path, packages: Path | None) -> dict[str, np.ndarray]:
    to.mkdir()
    env = {**os.environ, **({"PYTHONPATH": str(packages)} if packages else {}), "HF_HUB_OFFLINE": "1"}
    env["HF_MODULES_CACHE"] = str(to / "modules")  # where diffusers keeps copies of pipelines' code
    subprocess.run([sys.executable, "-W", "ignore", "-c", DRAW, str(models), str(to)], check=True, env=env, cwd=to)
    return {file.stem: np.load(file) for file in to.glob("*.npy")}


@pytest.mark.parametrize(("diffusers", "hub"), [("0.22.3", "0.25.2"), ("0.36.0", "0.36.0")])
def test_other_versions_of_diffusers_draw_the_same_images(
    models: Path, tmp_path: Path, diffusers: str, hub: str
) -> None:
    """0.22 is the first that takes a pipeline's code from its folder; 0.33 to 0.36 read the annotations of it."""
    packages = [f"diffusers=={diffusers}", f"huggingface_hub=={hub}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    subprocess.run([*pip, *packages], check=True)
    ours = drawn(models, tmp_path / "ours", None)
    theirs = drawn(models, tmp_path / "theirs", tmp_path / "packages")
    assert len(ours) == len(theirs) == 4
    for name, images in ours.items():
        # The first step of UniPC was a little different.
        assert np.abs(images - theirs[name]).max() < (0.02 if "class" in name else 1e-4), name
