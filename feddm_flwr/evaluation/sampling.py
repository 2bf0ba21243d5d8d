"""Looking at a model: samples and grids of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from feddm_flwr.compute.cuda_graph import CudaGraph, release_memory, side_stream
from feddm_flwr.compute.precision import autocast
from feddm_flwr.config import FLOW_SCHEDULERS, SCHEDULERS, derive_seed
from feddm_flwr.data.images import Images
from feddm_flwr.models.autoencoder import decode
from feddm_flwr.models.class_pipeline import guided
from feddm_flwr.models.diffusion import is_flow
from feddm_flwr.models.pixels import to_uint8

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddpm": DDPMScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
}


def schedulers_for(scheduler_config: Any) -> tuple[str, ...]:
    """Returns the names of those that a model's scheduler configuration may be drawn by, the usual one first."""
    return FLOW_SCHEDULERS if is_flow(scheduler_config) else SCHEDULERS


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
    """Returns images drawn by deterministic DDIM (Song et al. 2021, eta = 0), DPM-Solver++ (Lu et al. 2022, second
    order), UniPC (Zhao et al. 2023) or DDPM's ancestral sampling (Ho et al. 2020), of flows by Euler or Heun, uint8
    (count, C, H, W).

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

    recording = CudaGraph(device)

    def pixels(x: torch.Tensor) -> torch.Tensor:
        return to_uint8(x).cpu()

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
            recording = CudaGraph(device)  # the other's memory is free then
            release_memory()
    recording.drop()
    release_memory()
    if autoencoder is not None:
        done = [pixels(decode(autoencoder, x)) for x in done]
    drawn: Images = torch.cat(done).numpy()
    return drawn


def _without_negative(solver: Any, steps: int) -> int:
    """Returns that many steps, or the next fewer without one below 0: diffusers' rounding adds it to some numbers of
    trailing steps. It would stand for pure noise, and UniPC divides by its distance from step 0."""
    while True:
        solver.set_timesteps(steps)
        if steps == 1 or solver.timesteps.min() >= 0:
            return steps
        steps -= 1


def _noise_of(seed: int, image: int) -> torch.Generator:
    """Returns where the noise of an image comes from that is added on the way."""
    return torch.Generator().manual_seed(derive_seed("sampling", seed, image))
