"""Looking at a model: samples and grids of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image

from feddm_flwr.class_pipeline import guided
from feddm_flwr.config import derive_seed
from feddm_flwr.images import Images
from feddm_flwr.latents import decode
from feddm_flwr.precision import autocast
from feddm_flwr.recording import Recording, release_memory, side_stream

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddpm": DDPMScheduler,
}


@torch.inference_mode()
def sample(
    network: Any,
    scheduler_config: Any,
    count: int,
    steps: int,
    seed: int,
    *,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    autoencoder: Any = None,
    scheduler: str = "unipc",
    batch_size: int = 0,
) -> Images:
    """Images drawn by deterministic DDIM (Song et al. 2021, eta = 0), DPM-Solver++ (Lu et al. 2022, second order),
    UniPC (Zhao et al. 2023) or DDPM's ancestral sampling (Ho et al. 2020), uint8 (count, C, H, W).

    `scheduler_config` is the configuration of the diffusers scheduler that the model was trained
    for. Noise is drawn on the CPU, image by image: image i depends on the seed and i
    only, not on device or batch size. A class-conditional model needs the label of each image; the last
    embedding of its is for no class. A latent one needs its autoencoder. On a GPU the network computes in bf16.
    """
    solver = _SCHEDULERS[scheduler].from_config(scheduler_config)
    steps = _without_negative(solver, steps)
    device = next(network.parameters()).device
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    random = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(shape, generator=random) for _ in range(count)])
    network.eval()
    done: list[torch.Tensor] = []
    classes = torch.tensor([*labels] if labels is not None else [0] * count, device=device)
    batch_size = batch_size or (256 if device.type == "cuda" else 64)

    def predict(x: torch.Tensor, t: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        with autocast("auto" if device.type == "cuda" else "fp32", device):
            if labels is None:
                predicted: torch.Tensor = network(x, t).sample
            else:
                predicted = guided(network, x, t, own, network.config.num_class_embeds - 1, guidance)
        return predicted.float()

    recording = Recording(device)

    def pixels(x: torch.Tensor) -> torch.Tensor:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

    def batch(images: slice) -> torch.Tensor:
        x, own = noise[images].to(device), classes[images]
        solver.set_timesteps(steps)  # and forget the batch before
        random = [_noise_of(seed, i) for i in range(count)[images]]
        added = {"generator": random} if scheduler == "ddpm" else {}
        for t in solver.timesteps:
            predicted = recording(predict, x, t.to(device), own).clone()  # which solvers remember
            x = solver.step(predicted, t, x, **added).prev_sample
        return x if autoencoder is not None else pixels(x)

    with side_stream(device):
        while (start := sum(map(len, done))) < count:
            try:
                done.append(batch(slice(start, start + batch_size)))
                continue
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            batch_size //= 2  # what the batch held is gone here, not before
            recording = Recording(device)  # the other's memory is free then
            release_memory()
    recording.drop()
    release_memory()
    if autoencoder is not None:
        done = [pixels(decode(autoencoder, x)) for x in done]
    drawn: Images = torch.cat(done).numpy()
    return drawn


def _without_negative(solver: Any, steps: int) -> int:
    """That many steps, or the next fewer without one below 0: diffusers' rounding adds it to some numbers of trailing
    steps. It would stand for pure noise, and UniPC divides by its distance from step 0."""
    while True:
        solver.set_timesteps(steps)
        if steps == 1 or solver.timesteps.min() >= 0:
            return steps
        steps -= 1


def _noise_of(seed: int, image: int) -> torch.Generator:
    """Where the noise of an image comes from that is added on the way."""
    return torch.Generator().manual_seed(derive_seed("sampling", seed, image))


def every_class(classes: int, count: int) -> list[int]:
    """Labels for `count` images, as many of each class as can be, class by class."""
    return [i * classes // count for i in range(count)]


def labels_like(counts: Mapping[str, int], names: Sequence[str], count: int) -> list[int]:
    """Labels of `count` samples, of each class in proportion to its images."""
    shares = np.cumsum([counts.get(name, 0) for name in names], dtype=float)
    places = (np.arange(count) + 0.5) / count * shares[-1]
    return [int(i) for i in np.searchsorted(shares, places, side="right")]


def to_image(pixels: Images) -> Image.Image:
    """One uint8 image (C, H, W) as a picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def grid(images: Images, cell: int = 56) -> Image.Image:
    """The images in a near-square grid; small ones are enlarged smoothly to about `cell` pixels, since
    nobody reads an 8x8 digit as it is."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, round(cell / height))
    height, width, gap = height * scale, width * scale, 2
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        canvas.paste(to_image(image).resize((width, height), Image.Resampling.BICUBIC), place)
    return canvas
