"""DP-SGD: a record's gradient is its own, its influence is bounded, and what hides it is noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import AS_PRESET, config
from torch import Tensor, nn

from feddm_flwr.compute.secret_random import SecretRandom
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.models import networks
from feddm_flwr.models.parameters import trainable
from feddm_flwr.training.examples import Pixels
from feddm_flwr.training.objectives import Denoising, Objective
from feddm_flwr.training.private import PrivateStep, poisson_batches
from feddm_flwr.training.reconstruction import Reconstruction

CPU = torch.device("cpu")
PRIVATE = {"privacy.mechanism": "dp-sgd", "privacy.noise-multiplier": 1.0, "train.precision": "fp32"}
RGB = {"data.name": "a/b", "data.channels": 3}
KINDS: dict[str, dict[str, Any]] = {
    "pixels": {"model.attention": "0,1", "model.block-channels": "16,32"},
    "classes": {"model.class-conditional": True},
    "scale and shift, several heads": {
        **RGB,
        "data.image-size": 16,
        "model.preset": "celeba-64",
        "model.block-channels": "32,64",
        "model.attention": "0,1",
    },
    "resampled by residual blocks": {
        **RGB,
        "data.image-size": 16,
        "model.preset": "lsun-church-256",
        "model.block-channels": "32,64",
        "model.attention": "1,0",
    },
    "several layers, dropout of 0": {
        "model.preset": "fashionmnist-28",
        "model.block-channels": "32,64",
        "model.attention": "0,1",
        "model.dropout": 0.0,
    },
    "flow": {"diffusion.prediction": "flow"},
    "weighted epsilon": {
        "diffusion.min-snr-gamma": 5.0,
        "diffusion.prediction": "epsilon",
        "diffusion.schedule": "linear",
    },
    "an autoencoder": {"stage": "autoencoder", "data.image-size": 16, "privacy.figures": "unprotected"},
}


def parts(c: RunConfig, records: int = 12) -> tuple[nn.Module, Objective, list[Tensor]]:
    """A network, what it minimizes on random images, and its parameters, none of them 0."""
    network = networks.build(c, {})
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():  # some begin as zeros, which keep gradients from those before
            p.add_(0.02 * torch.randn_like(p))
    shape = (records, c.data.channels, c.data.image_size, c.data.image_size)
    images = Pixels(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), True, CPU)
    if c.stage == "autoencoder":
        return network, Reconstruction(c, images, CPU), [*trainable(network)]
    labels = np.arange(records) % max(1, len(c.data.class_names))
    return network, Denoising(c, images, labels, CPU), [*trainable(network)]


def private_step(c: RunConfig, noise: float = 0.0, key: int = 1) -> tuple[PrivateStep, Objective, list[Tensor]]:
    network, objective, parameters = parts(c)
    secret = SecretRandom(bytes([key]) * 32)
    return (
        PrivateStep(network, objective, c.train, parameters, privacy=c.privacy, noise=noise, secret=secret),
        objective,
        parameters,
    )


def drawn_of(c: RunConfig, objective: Objective, records: list[int]) -> tuple[Tensor, ...]:
    index = torch.tensor(records, dtype=torch.int64).repeat_interleave(c.privacy.multiplicity)
    return objective.draw(index, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_clipped_gradients_are_those_of_a_loop_over_records(kind: str, draws: int) -> None:
    """opacus 1.6.0 gives 0 for convolutions whose input is channels-last in memory, without a word."""
    keys = {**KINDS[kind], **PRIVATE, "train.batch-size": 4, "train.micro-batch": 3, "privacy.multiplicity": draws}
    c = config(**keys)
    network, objective, parameters = parts(c)
    drawn = drawn_of(c, objective, [0, 5, 5, 7, 11])
    expected, norms = [torch.zeros_like(p) for p in parameters], []
    alone = []
    for record in zip(*(tensor.split(draws) for tensor in drawn), strict=True):
        alone.append(torch.autograd.grad(objective.losses(network, record).mean(), parameters))
        norms.append(float(torch.stack([g.norm() for g in alone[-1]]).norm()))
    clip = float(np.median(norms))  # some are shortened, some are not
    for gradients, norm in zip(alone, norms, strict=True):
        for one, g in zip(expected, gradients, strict=True):
            one += g * min(1.0, clip / norm)
    c = config(**keys, **{"privacy.clip-norm": clip})
    step = PrivateStep(network, objective, c.train, parameters, privacy=c.privacy, noise=0.0, secret=SecretRandom())
    step._backward(drawn)
    for (name, p), one in zip(
        ((n, p) for n, p in network.named_parameters() if p.requires_grad), expected, strict=True
    ):
        assert p.grad is not None
        assert float(one.norm()) > 0, name
        torch.testing.assert_close(
            p.grad * 4, one, rtol=1e-3, atol=1e-5 * clip, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_low_rank_adapter_is_all_that_has_gradients(tmp_path: Any) -> None:
    pytest.importorskip("peft")
    from feddm_flwr.models.lora import add_adapters

    c = config(**PRIVATE, **{"model.block-channels": "8,8", "model.attention": "0,1", "train.batch-size": 4})
    network, objective, _ = parts(c)
    lora = config(**PRIVATE, **{"model.init-from": str(tmp_path), "model.lora-rank": 2})
    add_adapters(network, lora)
    parameters = [*trainable(network)]
    drawn = drawn_of(c, objective, [0, 1, 2])
    expected = torch.autograd.grad(objective.losses(network, drawn).sum(), parameters)
    wide = config(**PRIVATE, **{"privacy.clip-norm": 1e6}).privacy
    PrivateStep(network, objective, c.train, parameters, privacy=wide, noise=0.0, secret=SecretRandom())._backward(
        drawn
    )
    for p, one in zip(parameters, expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad * 4, one, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def summed(step: PrivateStep, parameters: list[Tensor], drawn: tuple[Tensor, ...]) -> tuple[Tensor, float]:
    """The gradients of a batch as one vector, and what it tells of the losses."""
    loss = float(step._backward(drawn))
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), loss


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, 1e30])
def test_one_record_more_changes_no_more_than_the_noise_is_for(broken: float | None) -> None:
    """Under the same noise, gradients differ by at most clip-norm, and losses by at most 1."""
    c = config(**PRIVATE, **{"privacy.clip-norm": 0.3, "train.batch-size": 4})
    found = []
    for count in (3, 4):
        step, objective, parameters = private_step(c, noise=1.0)
        drawn = drawn_of(c, objective, [0, 1, 2, 3])
        if broken is not None:
            drawn[0][3] = broken
        found.append(summed(step, parameters, tuple(tensor[:count] for tensor in drawn)))
    (before, loss_before), (after, loss_after) = found
    assert bool(after.isfinite().all())
    assert 4 * float((after - before).norm()) <= 0.3 * (1 + 1e-4)
    assert 0 <= 4 * (loss_after - loss_before) <= 1 + 1e-4
    if broken is None:
        assert 4 * float((after - before).norm()) > 0.29  # it was clipped, and is there


def test_what_hides_a_batch_is_gaussian_noise_of_the_size_that_is_accounted_for() -> None:
    c = config(**PRIVATE, **AS_PRESET, **{"privacy.clip-norm": 0.5, "train.batch-size": 4})
    (clear, loss), (noisy, told) = (
        summed(step, parameters, drawn_of(c, objective, [0, 1, 2]))
        for step, objective, parameters in (private_step(c, 0.0), private_step(c, 3.0))
    )
    found = (noisy - clear).double() / (3.0 * 0.5 * math.hypot(1, 0.1) / 4)
    assert len(found) > 50_000
    assert float(found.mean()) == pytest.approx(0, abs=5 / math.sqrt(len(found)))
    assert float(found.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * len(found)))
    assert float((found.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.005)
    assert abs(told - loss) < 6 * 3.0 * math.hypot(1, 0.1) / 0.1 / 4  # of the same noise, in units of the loss
    assert told != loss


def test_no_low_bit_tells_what_is_hidden() -> None:
    """Mironov 2012: sums of floating-point numbers have bits that their smaller part leaves nothing of."""
    c = config(**PRIVATE, **{"privacy.clip-norm": 0.5, "train.batch-size": 4})
    step, objective, parameters = private_step(c, noise=1.0)
    gradient, _ = summed(step, parameters, drawn_of(c, objective, [0, 1, 2]))
    unit = 1.0 * 0.5 * math.hypot(1, 0.1) * 2.0**-20 / 4
    places = gradient.double() / unit
    assert float((places - places.round()).abs().max()) < 0.3  # float32 has 24 bits
    last = (places.round().long() % 2).double()
    assert float(last.mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(last)))


def test_a_tiny_norm_does_not_show_the_loss() -> None:
    c = config(**PRIVATE, **{"privacy.clip-norm": 1e-6, "train.batch-size": 4})
    told = []
    for key in range(1, 9):
        step, objective, parameters = private_step(c, noise=10.0, key=key)
        told.append(summed(step, parameters, drawn_of(c, objective, [0, 1, 2]))[1])
    fractions = {round(one % 0.25, 3) for one in told}
    assert len(fractions) == len(told)
    with pytest.raises(ConfigError, match=r"privacy\.clip-norm = 1e-07"):
        config(**PRIVATE, **{"privacy.clip-norm": 1e-7})


def test_a_batch_with_nobody_in_it_is_noise_alone() -> None:
    c = config(**PRIVATE, **{"train.batch-size": 4})
    step, objective, parameters = private_step(c, noise=1.0)
    gradient, _ = summed(step, parameters, drawn_of(c, objective, []))
    assert float(gradient.std()) == pytest.approx(math.hypot(1, 0.1) / 4, rel=0.02)


def test_each_record_is_in_a_batch_by_chance_and_by_itself() -> None:
    batches = poisson_batches([1] * 50, 5, 2, SecretRandom(bytes(32)), CPU)
    picked = torch.zeros(4000, 50, dtype=torch.bool)
    for row in picked:
        index = next(batches)
        assert torch.equal(index[::2], index[1::2])
        row[index] = True
    sizes = picked.sum(1).double()
    assert float(sizes.mean()) == pytest.approx(5, abs=0.15)
    assert float(sizes.var()) == pytest.approx(50 * 0.1 * 0.9, rel=0.1)
    assert float(picked.double().mean(0).sub(0.1).abs().max()) < 0.025
    together = (picked[:, :1] & picked[:, 1:]).double().mean(0)
    assert float(together.sub(0.01).abs().max()) < 0.01
    assert len(next(poisson_batches([1] * 3, 5, 1, SecretRandom(), CPU))) == 3  # all, where a batch is larger


def test_of_a_group_images_are_drawn_alike_and_of_no_other() -> None:
    sizes = [3, 1, 5]
    batches = poisson_batches(sizes, 2, 4, SecretRandom(bytes(32)), CPU)
    counts = torch.zeros(9)
    for _ in range(3000):
        index = next(batches)
        groups = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])[index].unflatten(0, (-1, 4))
        assert torch.equal(groups, groups[:, :1].expand(-1, 4))
        assert len({*groups[:, 0].tolist()}) == len(groups)
        counts += torch.bincount(index, minlength=9)
    expected = 3000 * 2 / 3 * 4 / torch.repeat_interleave(torch.tensor(sizes), torch.tensor(sizes))
    assert float((counts / expected - 1).abs().max()) < 0.1


def test_secret_numbers_are_uniform_normal_and_never_the_same() -> None:
    one, other = SecretRandom(), SecretRandom()
    assert not torch.equal(one.uniform(10), other.uniform(10))
    assert not torch.equal(one.uniform(10), one.uniform(10))
    uniform = SecretRandom(bytes(32)).uniform(1_000_000)
    counts = torch.histc(uniform, 100, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 150  # chi-square, 99 degrees of freedom
    assert 0 < float(uniform.min()) <= float(uniform.max()) <= 1
    normal = SecretRandom(bytes(32)).normal(1_500_001, CPU).double()  # an odd number, in pieces
    assert len(normal) == 1_500_001
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert float((normal**power).mean()) == pytest.approx(moment, abs=0.04)
    first, second = normal[:500_000], normal[524_288 : 524_288 + 500_000]  # of one draw: sine and cosine
    assert abs(float((first * second).mean())) < 0.01
