"""A model's folder in other hands: every sampler of diffusers, half precision, saved again, and its call."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverSDEScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils import is_torchsde_available
from local_grid import config
from torch import Tensor, nn

from feddm_flwr.models import networks, pipelines
from feddm_flwr.models.class_pipeline import ClassPipeline

TRAINED = pipelines.noise_scheduler(config(diffusion__timesteps=1000))
ALL = sorted(UniPCMultistepScheduler.from_config(TRAINED.config).compatibles, key=lambda c: c.__name__)
OTHERS = [c for c in ALL if c.__name__.startswith("EDM")]  # of another noise process
#: torchsde is not among this package's dependencies.
COMPATIBLE = [c for c in ALL if c not in OTHERS and (c is not DPMSolverSDEScheduler or is_torchsde_available())]
#: With which samplers a pixel model's own pipeline draws images, by the document.
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
SAID = re.findall(r"`(\w+)`", next(x for x in DOCUMENT.read_text().splitlines() if "`DDPMPipeline` with" in x))


class Known(nn.Module):
    """Of a data set with one image for each class, what a network would predict that had learned it all."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.config = networks.build(config(model__class_conditional=True), {}).config
        random = torch.Generator().manual_seed(0)
        self.images = nn.Parameter(torch.rand(11, 1, 8, 8, generator=random) * 1.6 - 0.8)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        whole = np.arange(1000)
        power = float(np.interp(float(t), whole, TRAINED.alphas_cumprod.numpy()))
        signal, noise = power**0.5, (1 - power) ** 0.5
        image = self.images[[3] * len(x) if labels is None else labels]
        eps = (x - signal * image) / noise
        if noise > 0.3:  # what a sampler does not scale as it should has noise of another power
            assert 0.6 < eps.std() < 1.5, (float(t), float(eps.std()))
        return type("Output", (), {"sample": signal * eps - noise * image})


@pytest.mark.parametrize("sampler", COMPATIBLE, ids=lambda c: c.__name__)
def test_every_sampler_of_diffusers_finds_the_image_that_is_known(sampler: Any) -> None:
    """Some begin with noise of another size, and scale what the network sees."""
    unet = Known()
    pipeline = ClassPipeline(unet, sampler.from_config(TRAINED.config), class_names="0,1,2,3,4,5,6,7,8,9")
    pipeline.set_progress_bar_config(disable=True)
    for steps in (25, 40):
        drawn = pipeline([3, 7], 1.0, steps, torch.Generator().manual_seed(1), output_type="latent").images
        assert (drawn - unet.images[[3, 7]]).abs().max() < 0.05, steps
    assert pipeline.scheduler.__class__ is sampler


class NoDecoder(nn.Module):
    """An autoencoder of images that are their own latents."""

    dtype, device, config = torch.float32, torch.device("cpu"), type("Config", (), {"scaling_factor": 1.0})

    def decode(self, latents: Tensor) -> Any:
        return type("Output", (), {"sample": latents})


@pytest.mark.parametrize("sampler", COMPATIBLE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_diffusers_own_pipelines_find_it_with_the_samplers_that_we_say(kind: str, sampler: Any) -> None:
    """`DDPMPipeline` does not scale, and hands every sampler a generator."""
    unet = Known()
    scheduler = sampler.from_config(TRAINED.config)
    pipeline: Any = LDMPipeline(NoDecoder(), unet, scheduler) if kind == "latent" else DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(1)
    said = kind == "latent" or sampler.__name__ in SAID
    with nullcontext() if said else pytest.raises((TypeError, AssertionError)):
        found = pipeline(batch_size=1, num_inference_steps=25, generator=random, output_type="np").images
        assert np.abs(found[0, :, :, 0] * 2 - 1 - unet.images[3, 0].detach().numpy()).max() < 0.05


@pytest.mark.parametrize("sampler", [*OTHERS, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_sampler_of_another_noise_process_is_refused(sampler: Any) -> None:
    pipeline = ClassPipeline(Known(), sampler(), class_names="0,1,2,3,4,5,6,7,8,9")
    with pytest.raises(ValueError, match=f"{sampler.__name__}: is for networks of another noise process"):
        pipeline([3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    c = config(model__class_conditional=True)
    pipelines.save(networks.build(c, {}), c, {}, path, "")
    return path


def load(path: Path, **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(path, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, **options: Any) -> Any:
    asked = {"classes": [1, 2], "num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), **options}
    return pipeline(**{"output_type": "np", **asked}).images


@pytest.mark.parametrize(
    ("dtype", "variant"), [(None, None), (torch.float16, None), (torch.float16, "fp16"), (torch.bfloat16, None)]
)
def test_a_model_that_is_saved_again_is_the_same(
    folder: Path, dtype: torch.dtype | None, variant: str | None, tmp_path: Path
) -> None:
    first = load(folder, torch_dtype=dtype)
    first.scheduler = EulerDiscreteScheduler.from_config(first.scheduler.config)
    first.save_pretrained(tmp_path / "again", variant=variant)
    second = load(tmp_path / "again", torch_dtype=dtype, variant=variant)
    assert (second.unet.dtype, type(second.scheduler)) == (dtype or torch.float32, EulerDiscreteScheduler)
    assert (drawn(first) == drawn(second)).all()
    second.save_pretrained(tmp_path / "third", variant=variant)
    assert (tmp_path / "third" / "pipeline.py").read_bytes() == (folder / "pipeline.py").read_bytes()
    assert pipelines.class_names(pipelines.load(tmp_path / "third")) == [str(i) for i in range(10)]


def test_it_is_called_as_diffusers_own_are(folder: Path) -> None:
    pipeline = load(folder)
    whole = drawn(pipeline)
    assert (whole == drawn(pipeline, classes=np.array([1, 2]))).all()
    assert (whole == drawn(pipeline, classes=torch.tensor([1, 2]))).all()
    assert (whole == drawn(pipeline, classes=["1", "2"])).all()
    assert drawn(pipeline, classes=np.int64(3)).shape == drawn(pipeline, classes="3").shape == (1, 8, 8, 1)
    (images,) = pipeline([1, 2], 2.0, 4, torch.Generator().manual_seed(0), "pt", return_dict=False)
    assert np.allclose(images.permute(0, 2, 3, 1), whole)
    each = [torch.Generator().manual_seed(i) for i in range(2)]
    alone = [drawn(pipeline, classes=[c], generator=[torch.Generator().manual_seed(i)]) for i, c in enumerate((1, 2))]
    assert np.allclose(drawn(pipeline, generator=each), np.concatenate(alone), atol=1e-5)
    assert pipeline(num_inference_steps=2).images[9].size == (8, 8)
    for wrong in (10, -1, "ten", 1.0, True):
        with pytest.raises(ValueError, match=r"must be one of 0, 1, .*, or from 0 to 9"):
            pipeline([wrong])
    assert drawn(pipeline, num_inference_steps=7).min() >= 0  # diffusers' rounding has a step below 0 for some


def test_the_samplers_device_is_that_of_an_offloaded_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `enable_model_cpu_offload` the U-Net lies on the CPU until it is called."""
    pipeline = load(folder)
    freed: list[bool] = []
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("cpu"))
    monkeypatch.setattr(type(pipeline.unet), "device", property(lambda _: pytest.fail("asked where the U-Net lies")))
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(True))
    pipeline([1], num_inference_steps=1, output_type="latent")
    assert freed == [True]
    assert type(pipeline).model_cpu_offload_seq == "unet->vae"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == ["pipeline", "ClassPipeline"]
