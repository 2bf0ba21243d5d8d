"""The process agrees with diffusers' scheduler, and the loss weights with their definition."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from feddm_flwr.config import parse
from feddm_flwr.evaluation import sampling
from feddm_flwr.models import diffusion, pipelines


def scheduler(schedule: str, timesteps: int = 1000, prediction: str = "v") -> DDPMScheduler:
    return pipelines.noise_scheduler(
        parse({"diffusion.schedule": schedule, "diffusion.timesteps": timesteps, "diffusion.prediction": prediction})
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [500, 1000])
def test_schedule_is_that_of_the_shipped_scheduler(schedule: str, timesteps: int) -> None:
    ours = diffusion.alphas_cumprod(schedule, timesteps)
    torch.testing.assert_close(ours, scheduler(schedule, timesteps).alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert (ours.diff() < 0).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noising_and_v_agree_with_diffusers(schedule: str) -> None:
    x0, noise = torch.randn(2, 16, 3, 8, 8).unbind()
    t = torch.randint(1000, (16,))
    theirs = scheduler(schedule, prediction="v")
    abar = theirs.alphas_cumprod[t]
    torch.testing.assert_close(diffusion.add_noise(x0, noise, abar), theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(diffusion.target("v", x0, noise, abar), theirs.get_velocity(x0, noise, t))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_x0(prediction: str, gamma: float) -> None:
    """Whatever is predicted, weight * squared error = min(SNR, gamma) * squared error of x_0."""
    x0, noise, wrong = torch.randn(3, 64, 1, 4, 4, dtype=torch.float64).unbind()
    abar = diffusion.alphas_cumprod("cosine", 1000).double()[torch.linspace(5, 990, 64).long()]
    a = abar.view(-1, 1, 1, 1)
    xt = diffusion.add_noise(x0, noise, abar)
    # A prediction that stands for another x_0, at the same x_t.
    other_noise = (xt - a.sqrt() * wrong) / (1 - a).sqrt()
    error = diffusion.target(prediction, x0, noise, abar) - diffusion.target(prediction, wrong, other_noise, abar)
    weighted = diffusion.loss_weight(prediction, abar, gamma) * error.square().flatten(1).mean(1)
    snr = abar / (1 - abar)
    torch.testing.assert_close(weighted, snr.clamp(max=gamma) * (x0 - wrong).square().flatten(1).mean(1))


def test_no_gamma_weighs_alike() -> None:
    assert (diffusion.loss_weight("v", torch.rand(9), 0.0) == 1).all()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_few_sampling_steps_begin_where_there_is_only_noise(name: str) -> None:
    solver = sampling._SCHEDULERS[name].from_config(scheduler("cosine").config)
    solver.set_timesteps(10)
    assert int(solver.timesteps[0]) == 999
