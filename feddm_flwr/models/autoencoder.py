"""A frozen autoencoder: how its latents are scaled, and decoding them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from feddm_flwr.compute.cuda_graph import release_memory
from feddm_flwr.models.pretrained import config_of, tensors_of

log = logging.getLogger(__name__)


def load_autoencoder(path: Path) -> AutoencoderKL:
    """Returns the autoencoder in a file, frozen."""
    model = AutoencoderKL.from_config(config_of(path))
    model.load_state_dict(tensors_of(path))
    frozen: AutoencoderKL = model.eval().requires_grad_(False)
    return frozen


_SMALLEST_TILE = 4  # latents, high and wide


def scaling(config: Mapping[str, Any]) -> tuple[float, float]:
    """Returns by how much the latents of an autoencoder with this configuration are shifted, then scaled, for the
    U-Net."""
    return float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])


@torch.no_grad()
def decode(model: Any, latents: Tensor) -> Tensor:
    """Returns latents (B, C, H, W) as images in [-1, 1], one at a time, in tiles where memory is short; on the CPU."""
    shift, scale = scaling(model.config)
    images = []
    for one in latents.split(1):
        while True:
            try:
                images.append(model.decode(one / scale + shift).sample.cpu())
                break
            except torch.OutOfMemoryError:
                tile = min(model.tile_latent_min_size, one.shape[-1]) // 2
                if tile < _SMALLEST_TILE:
                    raise
            log.info("out of memory: images are decoded in tiles of %d latents from here on", tile)
            release_memory()
            model.enable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = tile * stride_of(model), tile
    return torch.cat(images)


def stride_of(model: Any) -> int:
    """Returns how many pixels a latent is high and wide."""
    return int(2 ** (len(model.config.block_out_channels) - 1))
