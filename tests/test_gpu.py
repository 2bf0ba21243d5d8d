"""What can be seen on a GPU only."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from feddm_flwr.compute import cuda_graph
from feddm_flwr.compute.device import prepare_process
from feddm_flwr.config import RunConfig, parse
from feddm_flwr.evaluation import sampling
from feddm_flwr.models import networks, parameters, pipelines
from feddm_flwr.training import loop
from feddm_flwr.training.examples import Pixels
from feddm_flwr.training.loop import Progress
from feddm_flwr.training.objectives import Denoising
from feddm_flwr.vector import Vector

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {
    "data.name": "none",
    "data.image-size": 32,
    "data.channels": 3,
    "model.preset": "cifar10-32-small",
    "model.dropout": 0.1,
    "train.local-steps": 30,
    "train.batch-size": 32,
    "train.deterministic": True,
}


def config(**keys: object) -> RunConfig:
    return parse({**SMALL, **keys})


def trained(
    c: RunConfig, images: int = 150, network: torch.nn.Module | None = None, step: loop.Step | None = None
) -> tuple[Vector, loop.Trained]:
    device = prepare_process(c.train)
    network = network or networks.build(c, {}).to(device)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3, 32, 32), np.uint8)
    objective = Denoising(c, Pixels(pixels, True, device), np.zeros(images, np.int64), device)
    size = parameters.layout(network).size
    correction = np.full(size, 1e-3, np.float32) if c.train.control != "none" else None
    inherited = loop.Inherited(correction=correction)
    result = loop.train(network, objective, c, "node", Progress(1, 0), device, inherited, step=step)
    return parameters.to_vector(network), result


KINDS = pytest.mark.parametrize(
    "keys",
    [
        {},
        {"train.precision": "fp32"},
        {"strategy": "feddm-prox", "train.mu": 0.1},
        {"train.micro-batch": 10},
        {"train.checkpointing": True},
        {"train.optimizer": "muon"},
        {"train.control": "scaffold"},
    ],
    ids=str,
)


@KINDS
def test_recorded_steps_give_the_bits_of_those_that_are_launched_one_by_one(
    keys: dict[str, object],
) -> None:
    recorded, again = trained(config(**keys)), trained(config(**keys))
    launched = trained(config(**keys, **{"train.cuda-graph": False}))
    assert recorded[0].tobytes() == again[0].tobytes() == launched[0].tobytes()
    assert (recorded[1].loss, recorded[1].steps) == (launched[1].loss, launched[1].steps)
    if (control := launched[1].control) is not None:
        assert recorded[1].control is not None
        assert recorded[1].control.tobytes() == control.tobytes()


@KINDS
def test_what_was_recorded_in_an_earlier_task_gives_the_same_bits(keys: dict[str, object]) -> None:
    c = config(**keys)
    network = networks.build(c, {}).to(prepare_process(c.train))
    begun = parameters.to_vector(network)
    step = trained(c, 90, network)[1].step
    gc.collect()
    torch.cuda.empty_cache()
    for images in (150, 320):  # each of which is another objective, whose memory is given back
        parameters.load_vector(network, begun)
        again = trained(c, images, network, step)
        assert again[1].step is step
        assert again[0].tobytes() == trained(c, images)[0].tobytes()


def test_steps_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Denoising, "losses", lambda self, *a, old=Denoising.losses: seen.append(1) or old(self, *a))
    trained(config(), images=320)
    assert len(seen) == cuda_graph._BEFORE + 1


def test_a_batch_that_was_cut_is_recorded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, losses = [], Denoising.losses

    def little_memory(self: Denoising, network: torch.nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.append(len(drawn[0]))
        if len(drawn[0]) > 16:
            raise torch.OutOfMemoryError
        return losses(self, network, drawn)

    monkeypatch.setattr(Denoising, "losses", little_memory)
    trained(config(), images=320)
    assert seen == [32, 16, 16, 16, 16]  # one that fails, one step, one recording


def test_garbage_of_earlier_steps_spoils_no_recording(caplog: pytest.LogCaptureFixture) -> None:
    """As the cyclic garbage collector frees it, whenever it likes."""
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        expected = trained(config())[0]
        ring: list[object] = [*garbage()]
        ring.append(ring)
        del ring
        assert trained(config())[0].tobytes() == expected.tobytes()
    finally:
        gc.set_threshold(*threshold)
    assert "CUDA graph" not in caplog.text


def garbage() -> Iterator[cuda_graph.CudaGraph]:
    """Recordings that were made."""
    device, x = torch.device("cuda"), torch.ones(3, device="cuda")
    for _ in range(3):
        one = cuda_graph.CudaGraph(device)
        with cuda_graph.side_stream(device):
            for _ in range(3):
                one(torch.sin, x)
        yield one


def test_a_compiled_network_trains_as_well(caplog: pytest.LogCaptureFixture) -> None:
    keys = {"train.deterministic": False, "model.dropout": 0.0}
    plain = trained(config(**keys))[1].loss
    fused = trained(config(**keys, **{"train.compile": True}))[1].loss
    assert "train.compile" not in caplog.text
    assert fused == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("scheduler", ["unipc", "ddim", "ddpm"])
def test_samples_are_those_of_a_cpu(scheduler: str) -> None:
    """Up to the rounding of bf16; the steps of the first batch are recorded."""
    c = config()
    prepare_process(c.train)
    network = networks.build(c, {})
    process = pipelines.noise_scheduler(c).config
    on_cpu = sampling.sample(network, process, 6, 10, seed=1, scheduler=scheduler)
    on_gpu = sampling.sample(network.cuda(), process, 6, 10, seed=1, scheduler=scheduler, batch_size=4)
    assert np.abs(on_cpu.astype(int) - on_gpu).mean() < 4


def test_a_share_of_the_memory_is_kept_to_and_a_step_is_cut_to_fit(caplog: pytest.LogCaptureFixture) -> None:
    share, total = 0.02, torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with caplog.at_level(logging.WARNING, "feddm"):
            result = trained(config(**{"train.batch-size": 2048, "train.local-steps": 6}), images=4096)[1]
        assert result.steps == 6
        assert "out of memory" in caplog.text
        assert torch.cuda.max_memory_reserved() <= share * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
