"""The diffusion process: noise levels, what the network is to predict, how losses are weighed.

Symbols follow Ho et al. 2020 (DDPM): x_t = signal_t x_0 + noise_t eps, with sqrt(abar_t) and sqrt(1 - abar_t) for t in
0..T-1. Flow matching (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003) goes straight from
images to noise: 1 - t/T and t/T for t in 1..T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feddm_flwr.config.keys import Diffusion

#: What diffusers' schedulers call ours.
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Tells whether the configuration of one of diffusers' schedulers is for models trained by flow matching."""
    return str(scheduler.get("_class_name", "")).startswith("FlowMatch")


def alphas_cumprod(schedule: str, timesteps: int) -> Tensor:
    """Returns abar_t for t = 0..T-1, shape (T,), float32.

    `linear`: beta from 1e-4 to 0.02 (Ho et al. 2020, section 4), whatever T is, as diffusers has it.
    `cosine`: Nichol and Dhariwal 2021, eq. 17, with beta at most 0.999.
    """
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    else:
        u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0).float()


@dataclass(frozen=True)
class Process:
    """A run's process; timesteps have the shape (B,), images (B, C, H, W)."""

    config: Diffusion
    signal: Tensor  # by timestep
    noise: Tensor
    snr: Tensor  # signal-to-noise ratio: that of the squares
    first: int  # timestep; there are as many as `diffusion.timesteps`

    def draw_times(self, count: int, random: torch.Generator) -> Tensor:
        """Returns timesteps for training, by `diffusion.times`: all as often, or most in the middle, as the logistic
        function of a normal number (Esser et al. 2024, arXiv 2403.03206, section 3.1)."""
        last, device = self.config.timesteps, random.device
        if self.config.times == "uniform":
            return torch.randint(last, (count,), generator=random, device=device) + self.first
        share = torch.randn(count, generator=random, device=device).sigmoid()
        return (share * last).long().clamp(max=last - 1) + self.first

    def spread_times(self, count: int) -> Tensor:
        """Returns the middles of that many equal parts of the timesteps, in order."""
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) * (self.config.timesteps / count)
        return middles.long() + self.first

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t."""
        return _images(self.signal, t) * x0 + _images(self.noise, t) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns what the U-Net is to predict: eps; v = signal eps - noise x_0 (Salimans and Ho 2022, appendix D); or
        the flow's velocity eps - x_0."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "flow":
            return noise - x0
        return _images(self.signal, t) * noise - _images(self.noise, t) * x0

    def weight(self, t: Tensor) -> Tensor:
        """Returns the weight of each image's squared error, shape (B,): Min-SNR-gamma (Hang et al. 2023, section 3.4),
        min(SNR, gamma) on the x_0 error, expressed for what is predicted; 1 where gamma is 0."""
        gamma, snr = self.config.min_snr_gamma, self.snr[t]
        if gamma == 0:
            return torch.ones_like(snr)
        clipped = snr.clamp(max=gamma)
        if self.config.prediction == "flow":
            return clipped * self.noise[t].square()
        return clipped / snr if self.config.prediction == "epsilon" else clipped / (snr + 1)


def process(config: Diffusion, device: torch.device | None = None) -> Process:
    """Returns the process of a configuration, with its tables on a device."""
    if config.prediction == "flow":
        noise = torch.linspace(0, 1, config.timesteps + 1, dtype=torch.float64)
        signal, snr, first = 1 - noise, ((1 - noise) / noise).square(), 1
    else:
        abar = alphas_cumprod(config.schedule, config.timesteps)
        signal, noise, snr, first = abar.sqrt(), (1 - abar).sqrt(), abar / (1 - abar), 0
    signal, noise, snr = (table.float().to(device) for table in (signal, noise, snr))
    return Process(config, signal, noise, snr, first)


def _images(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)
