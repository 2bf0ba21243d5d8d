"""The diffusion process as pure functions: noise schedule, training target, loss weight.

Symbols follow Ho et al. 2020 (DDPM): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t in 0..T-1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: What diffusers' schedulers call ours.
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


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


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Returns x_t for images (B, C, H, W) and their abar_t of shape (B,)."""
    a = abar.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def target(prediction: str, x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Returns what the U-Net is to predict: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022,
    appendix D)."""
    if prediction == "epsilon":
        return noise
    a = abar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def loss_weight(prediction: str, abar: Tensor, min_snr_gamma: float) -> Tensor:
    """Returns the weight of each image's squared error, shape (B,): Min-SNR-gamma (Hang et al. 2023, section 3.4),
    min(SNR, gamma) on the x_0 error, expressed for the given prediction; 1 where gamma is 0."""
    if min_snr_gamma == 0:
        return torch.ones_like(abar)
    snr = abar / (1 - abar)
    clipped = snr.clamp(max=min_snr_gamma)
    return clipped / snr if prediction == "epsilon" else clipped / (snr + 1)
