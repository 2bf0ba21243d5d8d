"""A node's images as latents of a frozen autoencoder: encoded once, kept on its disk, drawn from in every step.

Both the mean and the standard deviation are kept, so that a step draws a latent as if it encoded anew, and the
mirrored image beside the image where flips are asked for: mirroring a latent is not the same.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feddm_flwr.data.images import Images
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.models.autoencoder import load_autoencoder, stride_of
from feddm_flwr.models.pixels import to_network
from feddm_flwr.models.pretrained import config_of
from feddm_flwr.storage.array_cache import array, cached, new_array, write_facts
from feddm_flwr.training.examples import Latents

log = logging.getLogger(__name__)

_FORMAT = 1
_SAY_EVERY = 10.0  # seconds
_PIXELS_AT_A_TIME = 1 << 19  # encoded together: bounds the memory


def encoded(data: NodeData, autoencoder: Path, flip: bool, root: Path, device: torch.device) -> tuple[Latents, Latents]:
    """Returns the latents of a node's training and held-out images, from the cache below `root` or encoded now.

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
        x = to_network(torch.from_numpy(images[start : start + step]).to(device))
        for view, seen in enumerate((x, x.flip(-1))[: 1 + flip]):
            latents = model.encode(seen).latent_dist
            out[start : start + step, view] = torch.stack([latents.mean, latents.std], 1).half().cpu().numpy()
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            log.info("encoded %d of %d images", start + len(x), len(images))
