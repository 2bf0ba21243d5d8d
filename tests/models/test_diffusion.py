"""The process agrees with diffusers' scheduler, and the loss weights with their definition."""

from __future__ import annotations

from typing import Any

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


def flow_scheduler() -> Any:
    return pipelines.noise_scheduler(parse({"diffusion.prediction": "flow"}))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [500, 1000])
def test_schedule_is_that_of_the_shipped_scheduler(schedule: str, timesteps: int) -> None:
    ours = diffusion.alphas_cumprod(schedule, timesteps)
    torch.testing.assert_close(ours, scheduler(schedule, timesteps).alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert (ours.diff() < 0).all()


def process(**keys: Any) -> diffusion.Process:
    return diffusion.process(
        parse({f"diffusion.{key.replace('_', '-')}": value for key, value in keys.items()}).diffusion
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noising_and_v_agree_with_diffusers(schedule: str) -> None:
    x0, noise = torch.randn(2, 16, 3, 8, 8).unbind()
    t = torch.randint(1000, (16,))
    theirs, ours = scheduler(schedule, prediction="v"), process(schedule=schedule)
    torch.testing.assert_close(ours.at(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_sampler_of_flows_comes_back_to_the_image_along_the_velocity(name: str) -> None:
    """Whatever the steps are: paths are straight."""
    x0, noise = torch.randn(2, 1, 3, 8, 8).unbind()
    ours = process(prediction="flow")
    solver = sampling._SCHEDULERS[name].from_config(flow_scheduler().config)
    solver.set_timesteps(10)
    x = ours.at(x0, noise, torch.tensor([1000]))
    torch.testing.assert_close(x, noise)
    for t in solver.timesteps:
        if float(t) == int(t):
            torch.testing.assert_close(x, ours.at(x0, noise, t.long()[None]))
        x = solver.step(ours.target(x0, noise, t.long()[None]), t, x).prev_sample
    torch.testing.assert_close(x, x0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_x0(prediction: str, gamma: float) -> None:
    """Whatever is predicted, weight * squared error = min(SNR, gamma) * squared error of x_0."""
    x0, noise, wrong = torch.randn(3, 64, 1, 4, 4, dtype=torch.float64).unbind()
    schedule = {} if prediction == "flow" else {"schedule": "linear"}
    ours, t = process(prediction=prediction, min_snr_gamma=gamma, **schedule), torch.linspace(5, 990, 64).long()
    # A prediction that stands for another x_0, at the same x_t.
    signal, level = (table.double()[t].view(-1, 1, 1, 1) for table in (ours.signal, ours.noise))
    other_noise = (ours.at(x0, noise, t) - signal * wrong) / level
    error = ours.target(x0, noise, t) - ours.target(wrong, other_noise, t)
    weighted = ours.weight(t) * error.square().flatten(1).mean(1)
    expected = (signal / level).flatten().square().clamp(max=gamma) * (x0 - wrong).square().flatten(1).mean(1)
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_no_gamma_weighs_alike(prediction: str) -> None:
    ours = process(prediction=prediction)
    assert (ours.weight(torch.arange(ours.first, ours.first + 1000)) == 1).all()


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_times_are_of_the_process_and_as_often_as_they_are_to_be(prediction: str) -> None:
    random = torch.Generator().manual_seed(0)
    for times, middle in (("uniform", 0.25), ("logit-normal", 0.3905)):  # P(|z| < log 5/3) of a normal number z
        ours = process(prediction=prediction, times=times)
        drawn = ours.draw_times(20_000, random)
        assert ours.first <= int(drawn.min()) <= int(drawn.max()) < len(ours.signal)
        inside = ((drawn - ours.first) / 1000 - 0.5).abs() < 0.125
        assert float(inside.float().mean()) == pytest.approx(middle, abs=0.015)
        assert ours.spread_times(4).tolist() == [ours.first + middle for middle in (125, 375, 625, 875)]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_few_sampling_steps_begin_where_there_is_only_noise(name: str) -> None:
    solver = sampling._SCHEDULERS[name].from_config(scheduler("cosine").config)
    solver.set_timesteps(10)
    assert int(solver.timesteps[0]) == 999
