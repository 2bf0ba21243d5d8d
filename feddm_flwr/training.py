"""The local loop of a node: DDPM training on its own images, and the held-out denoising loss."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from feddm_flwr import diffusion
from feddm_flwr.config import RunConfig, derive_seed, local_steps
from feddm_flwr.data import Images
from feddm_flwr.model import Vector, load_vector

#: torch's own choice: the cores that this process may use.
_CORES = torch.get_num_threads()


@dataclass(frozen=True)
class Progress:
    """Where in the run a node stands."""

    round: int  # counted from 1
    steps_before: int  # local steps in all earlier rounds


@dataclass(frozen=True)
class Trained:
    """What came of a node's local training; the weights are in the model."""

    loss: float  # mean over the round's steps
    steps: int


def prepare_process(config: RunConfig) -> torch.device:
    """Fix thread count and determinism before any work; returns the device to train on.

    Thread counts change the order of sums and so the bits of a result.
    """
    ray = sys.modules.get("ray")
    simulated = ray is not None and ray.is_initialized()
    torch.set_num_threads(config.train.threads or (1 if simulated else _CORES))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)  # set or reset: the process may have served others
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where asked for, or where `auto` finds hardware that computes in bf16."""
    if config.train.precision == "auto":
        if device.type == "cuda":
            enabled = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            enabled = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        enabled = config.train.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def learning_rate(config: RunConfig, progress: Progress, step: int, steps: int) -> float:
    """The learning rate of a local step (from 0): linear warm-up over the global step, then constant,
    or a cosine from 1 to 0 over the share of the run that is done."""
    t = config.train
    warmup = min(1.0, (progress.steps_before + step + 1) / (t.warmup_steps + 1))
    if t.lr_schedule == "constant":
        return t.learning_rate * warmup
    done = (progress.round - 1 + step / steps) / config.num_server_rounds
    return t.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def add_proximal_gradient(parameters: list[Tensor], received: list[Tensor], mu: float) -> None:
    """Add mu * (w - w_t) to the gradients: the gradient of mu/2 * ||w - w_t||^2
    (Li et al. 2020, FedProx, eq. 2), with w_t the received weights."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters)
    torch._foreach_add_(gradients, torch._foreach_sub(parameters, received), alpha=mu)


def train(
    model: UNet2DModel,
    images: Images,
    config: RunConfig,
    name: str,
    progress: Progress,
    device: torch.device,
    start: Vector | None = None,
) -> Trained:
    """Train the model, which is on the device, in place on uint8 images (N, C, H, W), from fresh optimizer state.

    It begins from `start` where that is given; the proximal term pulls to the weights that the model comes with.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the weights are then worthless.
    """
    t, d = config.train, config.diffusion
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    model.train()
    pixels = torch.from_numpy(images).to(device)
    abar = diffusion.alphas_cumprod(d.schedule, d.timesteps).to(device)
    parameters = list(model.parameters())
    received = [p.detach().clone() for p in parameters] if t.mu > 0 else []
    if start is not None:
        load_vector(model, start)
    optimizer = torch.optim.AdamW(parameters, t.learning_rate, weight_decay=t.weight_decay, fused=True)
    steps = local_steps(config, len(images))
    random = torch.Generator(device).manual_seed(derive_seed(config.seed, name, progress.round, "train"))
    total, done = torch.zeros((), device=device), 0
    deadline = time.monotonic() + (t.max_seconds or math.inf)
    with _seeded_dropout(config, name, progress, device):
        for step, batch in zip(range(steps), _batches(len(images), t.batch_size, random), strict=False):
            optimizer.param_groups[0]["lr"] = learning_rate(config, progress, step, steps)
            loss = _loss(model, pixels[batch], config, abar, random, device)
            loss.backward()
            if t.mu > 0:
                add_proximal_gradient(parameters, received, t.mu)
            torch.nn.utils.clip_grad_norm_(parameters, t.max_grad_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            done += 1
            if time.monotonic() > deadline:
                break
    mean = float(total) / done  # the one synchronization with the device; NaN and inf survive the sum
    if not math.isfinite(mean):
        raise FloatingPointError(f"the training loss of {name} became {mean} in round {progress.round}")
    return Trained(mean, done)


def _batches(size: int, batch_size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Index batches without end: every image once per epoch, each epoch in a new order."""
    while True:
        order = torch.randperm(size, generator=random, device=random.device)
        yield from order.split(batch_size)


def _loss(
    model: UNet2DModel, batch: Tensor, config: RunConfig, abar: Tensor, random: torch.Generator, device: torch.device
) -> Tensor:
    """The training loss of a uint8 batch: random flip, timestep and noise, weighted squared error."""
    size, d = len(batch), config.diffusion
    x0 = batch.float() / 127.5 - 1
    if config.data.flip:
        mirrored = torch.rand(size, generator=random, device=device) < 0.5
        x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
    t = torch.randint(d.timesteps, (size,), generator=random, device=device)
    noise = torch.randn(x0.shape, generator=random, device=device)
    error = _squared_error(model, x0, t, noise, config, abar[t], device)
    return (error * diffusion.loss_weight(d.prediction, abar[t], d.min_snr_gamma)).mean()


def _squared_error(
    model: UNet2DModel, x0: Tensor, t: Tensor, noise: Tensor, config: RunConfig, abar: Tensor, device: torch.device
) -> Tensor:
    """Mean squared error of the prediction for each image, shape (B,), float32."""
    with autocast(config, device):
        prediction: Tensor = model(diffusion.add_noise(x0, noise, abar), t).sample
    goal = diffusion.target(config.diffusion.prediction, x0, noise, abar)
    return (prediction.float() - goal).square().flatten(1).mean(1)


@contextmanager
def _seeded_dropout(config: RunConfig, name: str, progress: Progress, device: torch.device) -> Iterator[None]:
    """Dropout draws from the global generator: seed it for the round, restore it after."""
    if config.model.dropout == 0:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, name, progress.round, "dropout"))
        yield


@torch.no_grad()
def held_out_loss(model: UNet2DModel, images: Images, config: RunConfig, name: str, device: torch.device) -> float:
    """Denoising loss on held-out uint8 images with noise and timesteps that are the same in every
    round: the timesteps are spread evenly over 0..T-1, the squared errors weigh alike.

    Returns NaN where there are no images.
    """
    if len(images) == 0:
        return math.nan
    d = config.diffusion
    model.eval()
    random = torch.Generator().manual_seed(derive_seed(config.seed, name, "held-out loss"))
    abar = diffusion.alphas_cumprod(d.schedule, d.timesteps).to(device)
    x0 = torch.from_numpy(images).to(device).float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=random).to(device)
    t = torch.from_numpy(np.linspace(0, d.timesteps - 1, len(x0)).round().astype(np.int64)).to(device)
    errors = [
        _squared_error(model, x, s, e, config, abar[s], device)
        for x, s, e in zip(*(v.split(config.train.batch_size) for v in (x0, t, noise)), strict=True)
    ]
    return float(torch.cat(errors).double().mean())
