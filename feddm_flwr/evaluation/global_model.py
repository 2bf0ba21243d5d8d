"""The model that is being trained, at whatever weights, and samples of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feddm_flwr.compute.device import usual_device
from feddm_flwr.config import RunConfig
from feddm_flwr.data.images import Images
from feddm_flwr.evaluation import grids, sampling
from feddm_flwr.models import autoencoder, parameters, pipelines, pretrained
from feddm_flwr.models.autoencoder import scaling
from feddm_flwr.models.pixels import to_network
from feddm_flwr.vector import Vector


class GlobalModel:
    """The network whose weights a run trains, and what it builds upon."""

    def __init__(self, network: torch.nn.Module, config: RunConfig, files: pretrained.Assets) -> None:
        self.network, self.config, self.files = network, config, files

    def at(self, weights: Vector) -> torch.nn.Module:
        """Returns the network with these weights, on the GPU where there is one."""
        parameters.load_vector(self.network.to(usual_device()), weights)
        return self.network

    def draw(self, weights: Vector, count: int, guidance: float, labels: Sequence[int] | None = None) -> Images:
        """Returns samples of these weights by the run's seed; by default as many of each class as can be."""
        c = self.config
        if labels is None and c.taught_classes:
            labels = grids.every_class(len(c.taught_classes), count)
        return sampling.sample(
            self.at(weights),
            pipelines.noise_scheduler(c).config,
            count,
            c.sample.steps,
            c.seed,
            labels=labels,
            guidance=guidance,
            autoencoder=self._autoencoder(),
            scheduler=c.sample.scheduler,
        )

    def _autoencoder(self) -> Any:
        file = self.files.get(pretrained.AUTOENCODER)
        return autoencoder.load_autoencoder(file).to(self._device) if file else None

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def inputs(self, images: Images) -> Tensor:
        """Returns images as the U-Net sees them: pixels in [-1, 1], or latents."""
        x = to_network(torch.from_numpy(images).to(self._device))
        if autoencoder := self._autoencoder():
            shift, scale = scaling(autoencoder.config)
            x = (autoencoder.encode(x).latent_dist.mean - shift) * scale
        return x
