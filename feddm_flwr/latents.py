"""A node's images as latents of a frozen autoencoder: encoded once, kept on its disk, drawn from in every step.

Both the mean and the standard deviation are kept, so that a step draws a latent as if it encoded anew, and the
mirrored image beside the image where flips are asked for: mirroring a latent is not the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddm_flwr.array_cache import array, cached, new_array, write_facts
from feddm_flwr.assets import config_of, load_autoencoder
from feddm_flwr.data import NodeData
from feddm_flwr.images import Images
from feddm_flwr.recording import release_memory

log = logging.getLogger("feddm")

_FORMAT = 1
_SAY_EVERY = 10.0  # seconds
_SMALLEST_TILE = 4  # latents, high and wide
_PIXELS_AT_A_TIME = 1 << 19  # encoded together: bounds the memory
_SHARE = 0.25  # of what is free of a GPU's memory, for a node's images


def scaling(config: Mapping[str, Any]) -> tuple[float, float]:
    """By how much the latents of an autoencoder with this configuration are shifted, then scaled, for the U-Net."""
    return float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])


def at_hand(values: NDArray[Any], device: torch.device) -> Tensor:
    """A node's examples as a tensor on the device, or in main memory if they would take too much of a GPU's."""
    fits = device.type != "cuda" or values.nbytes < _SHARE * torch.cuda.mem_get_info(device)[0]
    return torch.from_numpy(values).to(device if fits else "cpu")


class Latents:
    """Latents of some images, scaled as diffusers' pipelines expect."""

    def __init__(self, moments: NDArray[Any], config: Mapping[str, Any], device: torch.device) -> None:
        """`moments`: float16, (N, views, 2, C, H, W), mean and standard deviation of each view."""
        self._moments, self._device = at_hand(moments, device), device
        self._shift, self._scale = scaling(config)

    def __len__(self) -> int:
        return len(self._moments)

    def draw(self, index: Tensor, random: torch.Generator) -> Tensor:
        """Latents as in training, (B, C, H, W), float32."""
        view = torch.randint(self._moments.shape[1], (len(index),), generator=random, device=self._device)
        mean, std = self._of(index, view).unbind(1)
        noise = torch.randn(mean.shape, generator=random, device=self._device)
        return (mean + std * noise - self._shift) * self._scale

    def fixed(self, index: Tensor) -> Tensor:
        """Their means, without anything random."""
        return (self._of(index, torch.zeros_like(index))[:, 0] - self._shift) * self._scale

    def _of(self, index: Tensor, view: Tensor) -> Tensor:
        here = self._moments.device
        return self._moments[index.to(here), view.to(here)].to(self._device).float()


def encoded(data: NodeData, autoencoder: Path, flip: bool, root: Path, device: torch.device) -> tuple[Latents, Latents]:
    """The latents of a node's training and held-out images, from the cache below `root` or encoded now.

    Raises:
        OSError: the cache cannot be written.
    """
    # Of a fingerprint, the first half says which images, the second their version. The autoencoder's file has its
    # fingerprint as its name.
    images, version = data.fingerprint[:20], f"{data.fingerprint} {len(data.held_out)}"
    key = {"format": _FORMAT, "images": images, "flip": flip, "autoencoder": autoencoder.stem}

    def fill(folder: Path) -> None:
        log.info("encoding %d images, once", len(data.train) + len(data.held_out))
        model = load_autoencoder(autoencoder).to(device)
        for name, images in (("train", data.train), ("held-out", data.held_out)):
            _encode(model, images, flip, folder, name, device)
        write_facts(folder, {})

    # What decides the bits of an encoding.
    machine = [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), device.type]
    folder = cached(root, {**key, "machine": machine}, version, fill)
    config = config_of(autoencoder)
    train, held_out = (Latents(array(folder, name), config, device) for name in ("train", "held-out"))
    return train, held_out


@torch.no_grad()
def _encode(model: Any, images: Images, flip: bool, folder: Path, name: str, device: torch.device) -> None:
    size = images.shape[-1] // stride_of(model)
    shape = (len(images), 1 + flip, 2, model.config.latent_channels, size, size)
    out = new_array(folder, name, shape, np.float16)
    step = max(1, _PIXELS_AT_A_TIME // images.shape[-1] ** 2)
    said = time.monotonic()
    for start in range(0, len(images), step):
        x = torch.from_numpy(images[start : start + step]).to(device).float() / 127.5 - 1
        for view, seen in enumerate((x, x.flip(-1))[: 1 + flip]):
            latents = model.encode(seen).latent_dist
            out[start : start + step, view] = torch.stack([latents.mean, latents.std], 1).half().cpu().numpy()
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            log.info("encoded %d of %d images", start + len(x), len(images))


@torch.no_grad()
def decode(model: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as images in [-1, 1], one at a time, in tiles where memory is short; on the CPU."""
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
    """How many pixels a latent is high and wide."""
    return int(2 ** (len(model.config.block_out_channels) - 1))
