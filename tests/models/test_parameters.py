"""The U-Net and its flat vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from feddm_flwr.config import SCHEDULERS, parse
from feddm_flwr.evaluation import grids, sampling
from feddm_flwr.models import diffusion, networks, parameters, pipelines

TINY = parse({"model.preset": "tiny"})


def test_vector_and_model_are_one() -> None:
    network = networks.build(TINY, {})
    vector = parameters.to_vector(network)
    layout = parameters.layout(network)
    assert vector.shape == (layout.size,) == (sum(p.numel() for p in network.parameters()),)
    random = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    parameters.load_vector(network, random)
    assert parameters.to_vector(network).tobytes() == random.tobytes()
    with pytest.raises(ValueError, match="the vector has shape"):
        parameters.load_vector(network, random[:-1])


def test_initial_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = parameters.to_vector(networks.build(TINY, {}))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert parameters.to_vector(networks.build(TINY, {})).tobytes() == first.tobytes()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (
        parameters.to_vector(networks.build(parse({"model.preset": "tiny", "seed": 1}), {})).tobytes()
        != first.tobytes()
    )


def test_the_fingerprint_tells_architectures_apart() -> None:
    prints = {
        parameters.layout(networks.build(parse({"model.preset": "tiny", **keys}), {})).fingerprint
        for keys in ({}, {"model.block-channels": "16,64"}, {"model.layers-per-block": 2}, {"data.channels": 3})
    }
    assert len(prints) == 4


def test_the_shipped_folder_generates_with_diffusers_alone(tmp_path: Path) -> None:
    config = parse({"model.preset": "tiny", "diffusion.timesteps": 10, "sample.steps": 5})
    network = networks.build(config, {})
    pipelines.save(network, config, {}, tmp_path / "model", "card")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=10).images[0].size == (8, 8)
    assert parameters.to_vector(pipeline.unet).tobytes() == parameters.to_vector(network).tobytes()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_depends_on_its_number_and_seed_not_on_the_batch(scheduler: str) -> None:
    network = networks.build(TINY, {})
    config = pipelines.noise_scheduler(TINY).config
    few = sampling.sample(network, config, 3, 5, seed=1, scheduler=scheduler)
    many = sampling.sample(network, config, 10, 5, seed=1, batch_size=4, scheduler=scheduler)
    # Convolutions of another batch size may add in another order.
    assert np.abs(many[:3].astype(int) - few).max() <= 1
    assert (sampling.sample(network, config, 3, 5, seed=2, scheduler=scheduler) != few).any()


@pytest.mark.parametrize("steps", [20, 61, 794])  # diffusers' rounding adds one to the latter two
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_ends_at_what_the_denoiser_says(scheduler: str, steps: int) -> None:
    """A denoiser that knows of one image only must lead there."""
    image = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    abar = diffusion.alphas_cumprod("cosine", 1000)

    class Knowing(torch.nn.Module):
        config = type("Config", (), {"in_channels": 1, "sample_size": 8})

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            a = abar[int(t)]
            noise = (x - a.sqrt() * image) / (1 - a).sqrt()
            return type("Out", (), {"sample": a.sqrt() * noise - (1 - a).sqrt() * image})

    drawn = sampling.sample(
        Knowing(), pipelines.noise_scheduler(parse({})).config, 2, steps, seed=0, scheduler=scheduler
    )
    assert np.abs(drawn.astype(float) - ((image.numpy() + 1) * 127.5)).max() <= 4


def test_where_memory_runs_out_fewer_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network = networks.build(TINY, {})
    forward = network.forward

    def little_memory(x: torch.Tensor, *rest: Any) -> Any:
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return forward(x, *rest)

    config = pipelines.noise_scheduler(TINY).config
    whole = sampling.sample(network, config, 5, 3, seed=1)
    monkeypatch.setattr(network, "forward", little_memory)
    assert np.abs(sampling.sample(network, config, 5, 3, seed=1).astype(int) - whole).max() <= 1


@pytest.mark.parametrize(("count", "channels", "size"), [(1, 1, 8), (7, 3, 16), (64, 1, 28)])
def test_grids_hold_every_image(count: int, channels: int, size: int) -> None:
    images = np.full((count, channels, size, size), 7, np.uint8)
    scale = max(1, round(56 / size))
    assert (np.asarray(grids.grid(images)) == 7).sum() == count * channels * (size * scale) ** 2
