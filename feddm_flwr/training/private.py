"""Steps of DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1), as DPDM has them for diffusion (Dockhorn et al.
2023, arXiv 2210.09929, algorithm 1).

The gradient of a record, which is an image or a group of them, is the mean over several noise levels (and as many
images of the group, drawn at random), clipped to a norm. To the sum over a batch, in which each record is by chance and
by itself, comes Gaussian noise that nobody can foretell. The mean loss is one number more that the same noise hides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from feddm_flwr.compute.secret_random import SecretRandom
from feddm_flwr.config.privacy import Privacy
from feddm_flwr.models.parameters import split_like
from feddm_flwr.training.objectives import Drawn, Objective
from feddm_flwr.training.step import Step

_MOST_LOSS = 1.0  # of a record; a larger one counts as this
_GRADIENTS = 1 << 28  # values of gradients that are in memory at a time, unless train.micro-batch says how many records
_STEP = 2.0**-20  # over the noise
_OF_LOSS = 0.1  # how much of the clipping norm a loss can change; noise is 0.5 % more for it


class PrivateStep(Step):
    """The steps of one private training."""

    may_record = False

    def __init__(self, *inputs: Any, privacy: Privacy, noise: float, secret: SecretRandom) -> None:
        """Takes steps with this `noise` multiplier; the `inputs` are those of `Step`."""
        super().__init__(*inputs)
        self._clip_norm, self._draws, self._batch = privacy.clip_norm, privacy.multiplicity, self._train.batch_size
        self._noise, self._secret = noise, secret
        for layer in self._model.modules():
            if isinstance(layer, Attention):
                layer.set_processor(AttnProcessor())  # vmap takes torch's own, fused, record by record
        names = {id(p): f"network.{name}" for name, p in self._model.named_parameters()}
        self._names = [names[id(p)] for p in self._parameters]
        self._loss = _Loss(self._model, self._objective)
        self._micro = max(1, self._micro // self._draws)  # records, which have a gradient each
        if not self._train.micro_batch:
            self._micro = max(1, min(self._micro, _GRADIENTS // sum(p.numel() for p in self._parameters)))

    def _accumulate(self, drawn: Drawn) -> Tensor:
        """Leaves the noisy sum over the records, over the mean size of a batch, in the gradients; returns as much of
        the losses."""
        total, losses = [torch.zeros_like(p) for p in self._parameters], torch.zeros((), device=self._device)
        records = [tensor.unflatten(0, (-1, self._draws)) for tensor in drawn]
        for piece in zip(*(tensor.split(self._micro) for tensor in records), strict=True):
            if len(piece[0]):  # a batch may have nobody in it
                losses += self._add(piece, total)
        told = [*total, losses * (_OF_LOSS * self._clip_norm / _MOST_LOSS)]
        hidden = self._hidden(torch.cat([one.reshape(-1) for one in told])) / self._batch
        for p, own in zip(self._parameters, split_like(hidden[:-1], total), strict=True):
            p.grad = own.float()
        return (hidden[-1] * (_MOST_LOSS / (_OF_LOSS * self._clip_norm))).float()

    def _hidden(self, values: Tensor) -> Tensor:
        """Returns values that a record can change by the clipping norm and, at a right angle, by its share for the
        loss, with noise: whole multiples of a step, so that no low bit tells of them (Mironov 2012). Rounding them to
        it changes each by half a step at most, which there is more noise for."""
        if not self._noise:
            return values.double()
        most = self._clip_norm * math.hypot(1, _OF_LOSS)
        step = self._noise * most * _STEP
        scale = self._noise * (most + step * math.sqrt(len(values)))
        noise = self._secret.normal(len(values), self._device).mul_(scale / step).round_()
        return noise.add_(values.double().div_(step).round_()).mul_(step)

    def _add(self, piece: Drawn, total: list[Tensor]) -> Tensor:
        """Adds the clipped gradients of some records; returns the sum of their losses."""
        values = dict(zip(self._names, (p.detach() for p in self._parameters), strict=True))
        each = vmap(grad_and_value(self._loss_of), in_dims=(None, *(0 for _ in piece)), randomness="different")
        gradients, losses = each(values, *piece)
        found = [gradients[name] for name in self._names]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found]).norm(dim=0)
        factors = (self._clip_norm / norms).clamp(max=1.0)
        if not bool((good := norms.isfinite()).all()):  # one that is not finite counts as nothing
            found = [torch.where(good.view(-1, *(1 for _ in g.shape[1:])), g, 0) for g in found]
            factors = torch.where(good, factors, 0)
        for one, g in zip(total, found, strict=True):
            one.add_(torch.einsum("b,b...->...", factors, g))
        told: Tensor = losses.nan_to_num(_MOST_LOSS).clamp(0, _MOST_LOSS).sum()
        return told

    def _loss_of(self, values: dict[str, Tensor], *drawn: Tensor) -> Tensor:
        loss: Tensor = functional_call(self._loss, values, drawn)
        return loss


class _Loss(nn.Module):
    """The mean loss of what was drawn of one record, as a module, whose parameters can be put in place."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network, self._objective = network, objective

    def forward(self, *drawn: Tensor) -> Tensor:
        """Returns the mean loss, a scalar."""
        return self._objective.losses(self.network, drawn).mean()


def poisson_batches(
    sizes: Sequence[int], batch_size: int, draws: int, secret: SecretRandom, device: torch.device
) -> Iterator[Tensor]:
    """Yields batches without end, in each of which each record is with the same chance, by itself, with as many draws
    of its images, of which it has one or several, one after the other."""
    counts = torch.tensor(sizes, dtype=torch.int64)
    starts, chance = counts.cumsum(0) - counts, min(1.0, batch_size / len(counts))
    while True:
        chosen = (secret.uniform(len(counts)) <= chance).nonzero()[:, 0].repeat_interleave(draws)
        within = ((1 - secret.uniform(len(chosen))) * counts[chosen]).long()
        yield (starts[chosen] + within).to(device)
