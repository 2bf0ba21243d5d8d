"""A node's examples on the device: pixels, or the latents of a frozen autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from feddm_flwr.data.images import Images
from feddm_flwr.models.autoencoder import scaling
from feddm_flwr.models.pixels import to_network


class Examples(Protocol):
    """What a node trains on."""

    def __len__(self) -> int:
        """Returns how many examples there are."""

    def draw(self, index: Tensor, random: torch.Generator) -> Tensor:
        """Returns the examples with these places as in training, (B, C, H, W), float32."""

    def fixed(self, index: Tensor) -> Tensor:
        """Returns the same without anything random."""


class Pixels:
    """uint8 images (N, C, H, W) as what a network sees: float32 in [-1, 1], flipped at random where asked for."""

    def __init__(self, images: Images, flip: bool, device: torch.device) -> None:
        self._images, self._flip, self._device = at_hand(images, device), flip, device

    def __len__(self) -> int:
        return len(self._images)

    def draw(self, index: Tensor, random: torch.Generator) -> Tensor:
        """Returns training images, (B, C, H, W)."""
        x0 = self.fixed(index)
        if self._flip:
            mirrored = torch.rand(len(x0), generator=random, device=x0.device) < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)
        return x0

    def fixed(self, index: Tensor) -> Tensor:
        """Returns the same without anything random."""
        return to_network(self._images[index.to(self._images.device)].to(self._device))


_SHARE = 0.25  # of what is free of a GPU's memory, for a node's images


def at_hand(values: NDArray[Any], device: torch.device) -> Tensor:
    """Returns a node's examples as a tensor on the device, or in main memory if they would take too much of a GPU's."""
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
        """Returns latents as in training, (B, C, H, W), float32."""
        view = torch.randint(self._moments.shape[1], (len(index),), generator=random, device=self._device)
        mean, std = self._of(index, view).unbind(1)
        noise = torch.randn(mean.shape, generator=random, device=self._device)
        return (mean + std * noise - self._shift) * self._scale

    def fixed(self, index: Tensor) -> Tensor:
        """Returns their means, without anything random."""
        return (self._of(index, torch.zeros_like(index))[:, 0] - self._shift) * self._scale

    def _of(self, index: Tensor, view: Tensor) -> Tensor:
        here = self._moments.device
        return self._moments[index.to(here), view.to(here)].to(self._device).float()
