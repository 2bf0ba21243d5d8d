"""What is minimized: the denoising loss on pixels or latents, or an autoencoder's reconstruction and KL loss.

An objective holds a node's examples on the device. It draws all that is random in a step, but for dropout, for the
whole batch at once, so that a step gives the same gradients, up to the order of sums, into however many pieces it is
cut.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from feddm_flwr.compute.precision import autocast
from feddm_flwr.config import NOISE_LEVELS, RunConfig, derive_seed
from feddm_flwr.data.node_data import Labels
from feddm_flwr.models import diffusion
from feddm_flwr.training.examples import Examples

_LEVELS = 32  # that the loss of single examples is a mean over

Drawn = tuple[Tensor, ...]  # of one step; every tensor has the batch first


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation on held-out examples came to."""

    loss: float = math.nan  # NaN where there are none
    levels: list[float] = field(default_factory=list)  # the same by noise level, from the least noise to the most
    latent_power: float = math.nan  # an autoencoder's: the mean square of its latents


class Objective(ABC):
    """A loss over a node's examples."""

    @abstractmethod
    def __len__(self) -> int:
        """How many examples there are."""

    @abstractmethod
    def draw(self, index: Tensor, random: torch.Generator) -> Drawn:
        """Returns the examples with these places, and everything random about them."""

    @abstractmethod
    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """Returns the loss of each, shape (B,), float32."""

    @abstractmethod
    def held_out(self, network: nn.Module, limit: int, name: str) -> HeldOut:
        """Returns the network on at most `limit` of the examples, as those of node `name`; always the same way."""

    def without_examples(self) -> Objective:
        """Returns it without its examples, which `losses` does not need."""
        alone = copy.copy(self)
        for name in ("_examples", "_labels"):
            vars(alone).pop(name, None)
        return alone


class Denoising(Objective):
    """The simple loss of Ho et al. 2020, eq. 14, with the configured target and weights."""

    def __init__(self, config: RunConfig, examples: Examples, labels: Labels, device: torch.device) -> None:
        self._config, self._examples, self._device = config, examples, device
        self._labels = torch.from_numpy(labels).to(device)
        self._process = diffusion.process(config.diffusion, device)

    def __len__(self) -> int:
        return len(self._examples)

    def draw(self, index: Tensor, random: torch.Generator) -> Drawn:
        """Returns x_0, timestep, noise and label of each."""
        c, device, size = self._config, self._device, len(index)
        x0 = self._examples.draw(index, random)
        t = self._process.draw_times(size, random)
        noise = torch.randn(x0.shape, generator=random, device=device)
        labels = self._labels[index]
        if c.model.class_conditional:
            hidden = torch.rand(size, generator=random, device=device) < c.train.class_dropout
            labels = labels.masked_fill(hidden, len(c.data.class_names))
        return x0, t, noise, labels

    def losses(self, network: nn.Module, drawn: Drawn) -> Tensor:
        """Returns the weighted distance of each prediction to what it should be, shape (B,)."""
        t = drawn[1]
        weight = self._process.weight(t)
        distance = self.distance(*self._predict(network, drawn))
        if distance.shape != weight.shape:
            shape = tuple(distance.shape)
            raise ValueError(f"train.objective: distance must return a number for each image, ({len(t)},), not {shape}")
        return distance * weight

    def distance(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """Returns what is minimized, for each of predictions and goals (B, C, H, W): the mean squared error, (B,)."""
        return _squared_error(prediction, goal)

    def _predict(self, network: nn.Module, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Returns the predictions for what was drawn, float32, and what they should be."""
        x0, t, noise, labels = drawn
        classes = labels if self._config.model.class_conditional else None
        with autocast(self._config.train.precision, self._device):
            prediction: Tensor = network(self._process.at(x0, noise, t), t, classes).sample
        return prediction.float(), self._process.target(x0, noise, t)

    def fixed_losses(self, network: nn.Module, limit: int, name: str) -> Tensor:
        """Returns the squared errors of the first `limit` examples, (B,), with noise and timesteps that are the same in
        every round: the timesteps are spread over all, in order, so that few stand for all."""
        size = min(limit, len(self))
        random = torch.Generator().manual_seed(derive_seed(self._config.seed, name, "held-out loss"))
        return self._errors(network, self._process.spread_times(size), random)

    def mean_losses(self, network: nn.Module, name: str) -> Tensor:
        """Returns the squared error of each example, (N,), float64, as a mean over noise levels that are the same for
        all, each with one noise."""
        random = torch.Generator().manual_seed(derive_seed(self._config.seed, name, "mean losses"))
        levels = self._process.spread_times(_LEVELS)
        return torch.stack([self._errors(network, t.expand(len(self)), random).double() for t in levels]).mean(0)

    @torch.no_grad()
    def _errors(self, network: nn.Module, times: Tensor, random: torch.Generator) -> Tensor:
        """Returns the squared errors of as many of the first examples as there are times, (B,)."""
        network.eval()
        index = torch.arange(len(times), device=self._device)
        x0 = self._examples.fixed(index)
        noise = torch.randn(x0.shape, generator=random).to(self._device)
        drawn = (x0, times.to(self._device), noise, self._labels[index])
        pieces = zip(
            *(v.split(self._config.train.micro_batch or self._config.train.batch_size) for v in drawn), strict=True
        )
        return torch.cat([_squared_error(*self._predict(network, piece)) for piece in pieces])

    def held_out(self, network: nn.Module, limit: int, name: str) -> HeldOut:
        """Returns the mean of these, and that of each tenth of the timesteps."""
        if min(limit, len(self)) == 0:
            return HeldOut()
        losses = self.fixed_losses(network, limit, name).double().cpu()
        levels = [float(part.mean()) for part in losses.tensor_split(NOISE_LEVELS)]
        return HeldOut(float(losses.mean()), levels)


def _squared_error(prediction: Tensor, goal: Tensor) -> Tensor:
    return (prediction - goal).square().flatten(1).mean(1)
