"""The local loop of a node: an objective is minimized on its own examples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from feddm_flwr.compute.cuda_graph import side_stream
from feddm_flwr.compute.secret_random import SecretRandom
from feddm_flwr.config import RunConfig, derive_seed, local_steps
from feddm_flwr.exchange.extras import Extras
from feddm_flwr.models.parameters import load_vector, trainable
from feddm_flwr.training.gradient_terms import Control, gradient_terms
from feddm_flwr.training.moments import Memory
from feddm_flwr.training.objectives import Objective
from feddm_flwr.training.private import PrivateStep, poisson_batches
from feddm_flwr.training.step import Step
from feddm_flwr.vector import Vector


@dataclass(frozen=True)
class Progress:
    """Where in the run a node stands."""

    round: int  # counted from 1
    steps_before: int  # local steps in all earlier rounds; in a finish, of its own
    repeat: int = 0  # how often the round's training was drawn anew

    @property
    def drawn(self) -> str:
        """What the seeds of the round derive from."""
        return f"{self.round}/{self.repeat}" if self.repeat else str(self.round)


@dataclass(frozen=True)
class Inherited:
    """What a training begins with beside the received weights; vectors have the layout of the trainable parameters."""

    start: Vector | None = None  # weights that it begins from instead of those
    memory: Memory | None = None  # of its optimizers
    last_step: Vector | None = None  # global, of which `train.alignment` is added in equal parts by the local steps
    correction: Vector | None = None  # of every gradient, by control variates


@dataclass(frozen=True)
class Trained:
    """What came of a node's local training; the weights are in the model."""

    loss: float  # mean over the round's steps
    steps: int
    moments: Extras | None = None  # as the steps have left them, where there is a memory
    control: Vector | None = None  # the node's next control variate, where there is a correction
    step: Step | None = None  # that another training of the same network can have


def learning_rate(config: RunConfig, progress: Progress, step: int, steps: int) -> float:
    """Returns the learning rate of a local step (from 0): linear warm-up over the global step, then constant, or a
    cosine from 1 to 0 over the share of the run that is done. A finish has both for itself."""
    t = config.train
    warmup = min(1.0, (progress.steps_before + step + 1) / (t.warmup_steps + 1))
    if t.lr_schedule == "constant":
        return t.learning_rate * warmup
    first = config.before_finish
    past, rounds = (first, config.finish.rounds) if progress.round > first else (0, first)
    done = (progress.round - 1 - past + step / steps) / rounds
    return t.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: nn.Module,
    objective: Objective,
    config: RunConfig,
    name: str,
    progress: Progress,
    device: torch.device,
    inherited: Inherited = Inherited(),
    noise: float = 0.0,
    groups: Sequence[int] = (),
    step: Step | None = None,
) -> Trained:
    """Trains the model, which is on the device, in place on the objective's examples, with fresh optimizers but for
    what is `inherited`. The proximal term pulls to the weights that the model comes with. A private run has a
    `noise` multiplier, and protects each of the `groups`, which have so many of the examples one after the other, or
    each example. The `step` of the last training of this network, by the same configuration,
    need not be recorded again.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the weights are then worthless.
        torch.OutOfMemoryError: not even one image fits into memory.
    """
    t = config.train
    model.train()
    parameters: list[Tensor] = [*trainable(model)]
    steps, memory, along, correction = local_steps(config, len(objective)), inherited.memory, None, None
    if inherited.last_step is not None:
        along = torch.from_numpy(inherited.last_step * np.float32(t.alignment / steps)).to(device)
    if inherited.correction is not None:
        correction = torch.tensor(inherited.correction, device=device)
    random, secret = torch.Generator(device), SecretRandom() if config.privacy.of_images else None
    if step is None or not step.begin_again(objective, memory, correction, along):
        terms = gradient_terms(t)
        if correction is not None:
            terms.append(Control(correction, t.max_grad_norm))
        for term in terms:
            term.start(parameters)
        inputs = model, objective, t, parameters, terms, memory, along
        step = PrivateStep(*inputs, privacy=config.privacy, noise=noise, secret=secret) if secret else Step(*inputs)
    if inherited.start is not None:
        load_vector(model, inherited.start)
    if secret:
        records = groups or [1] * len(objective)
        batches = poisson_batches(records, t.batch_size, config.privacy.multiplicity, secret, device)
        random.manual_seed(secret.seed())
    else:
        batches = _batches(len(objective), t.batch_size, random)
        random.manual_seed(derive_seed(config.seed, name, progress.drawn, "train"))
    total, done = torch.zeros((), device=device), 0
    deadline = time.monotonic() + (t.max_seconds or math.inf)
    with _seeded_dropout(config, name, progress, device), side_stream(device, step.records):
        for number, batch in zip(range(steps), batches, strict=False):
            loss = step(objective.draw(batch, random), learning_rate(config, progress, number, steps))
            total += loss
            done += 1
            if t.max_seconds and device.type == "cuda":
                torch.cuda.synchronize()  # the clock is to tell of steps that were done, not launched
            if time.monotonic() > deadline:
                break
    mean = float(total) / done  # the one synchronization with the device; NaN and inf survive the sum
    if not math.isfinite(mean):
        raise FloatingPointError(f"the training loss of {name} became {mean} in round {progress.round}")
    moments = memory.end(step.optimizers, parameters) if memory else None
    if config.privacy.of_images:  # what is told of the losses is noise in part
        mean = max(mean, 0.0)
    control = step.control.mean(done).cpu().numpy() if step.control else None
    step.rest()
    return Trained(mean, done, moments, control, step)


def _batches(size: int, batch_size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Yields index batches without end: every image once per epoch, each epoch in a new order."""
    while True:
        order = torch.randperm(size, generator=random, device=random.device)
        yield from order.split(batch_size)


@contextmanager
def _seeded_dropout(config: RunConfig, name: str, progress: Progress, device: torch.device) -> Iterator[None]:
    """Seeds the global generator for the round, which dropout draws from, and restores it after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, name, progress.drawn, "dropout"))
        yield
