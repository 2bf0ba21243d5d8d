"""The objective of an autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from feddm_flwr.compute.precision import autocast
from feddm_flwr.config import RunConfig
from feddm_flwr.models.vgg16 import VGG16
from feddm_flwr.training.examples import Pixels
from feddm_flwr.training.objectives import Drawn, HeldOut, Objective


class Reconstruction(Objective):
    """An autoencoder's loss: mean absolute error, the KL divergence of the latents from a standard normal, and, where
    a network is given for it, the difference in looks (Rombach et al. 2022, appendix G, without the adversary)."""

    def __init__(self, config: RunConfig, examples: Pixels, device: torch.device, looks: VGG16 | None = None) -> None:
        self._config, self._examples, self._device, self._looks = config, examples, device, looks

    def __len__(self) -> int:
        return len(self._examples)

    def draw(self, index: Tensor, random: torch.Generator) -> Drawn:
        """Returns images, and the noise of their latents."""
        c = self._config
        x = self._examples.draw(index, random)
        size = c.data.image_size // 2 ** (len(c.autoencoder.block_channels) - 1)
        shape = (len(index), c.autoencoder.latent_channels, size, size)
        return x, torch.randn(shape, generator=random, device=self._device)

    def losses(self, network: Any, drawn: Drawn) -> Tensor:
        """Returns the error of the reconstruction from a sampled latent, plus the weighted KL term."""
        x, noise = drawn
        with autocast(self._config.train.precision, self._device):
            latents = network.encode(x).latent_dist
            decoded = network.decode(latents.mean + latents.std * noise).sample
            looks = self._looks(decoded, x) if self._looks else 0.0
        error = (decoded.float() - x).abs().flatten(1).mean(1) + self._config.autoencoder.perceptual_weight * looks
        divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).float().flatten(1).mean(1)
        losses: Tensor = error + self._config.autoencoder.kl_weight * divergence
        return losses

    @torch.no_grad()
    def held_out(self, network: Any, limit: int, name: str) -> HeldOut:
        """Returns the mean squared error of the reconstruction of the first `limit` images from the mean of their
        latents, and the mean square of samples of these latents."""
        size = min(limit, len(self))
        if size == 0:
            return HeldOut()
        network.eval()
        errors, powers = [], []
        step = self._config.train.micro_batch or self._config.train.batch_size
        for index in torch.arange(size, device=self._device).split(step):
            x = self._examples.fixed(index)
            with autocast(self._config.train.precision, self._device):
                latents = network.encode(x).latent_dist
                decoded = network.decode(latents.mean).sample
            errors.append((decoded.float() - x).square().flatten(1).mean(1))
            # Of what a latent model is trained on, which is drawn from the distributions.
            powers.append((latents.mean.square() + latents.var).float().flatten(1).mean(1))
        return HeldOut(float(torch.cat(errors).double().mean()), [], float(torch.cat(powers).double().mean()))
