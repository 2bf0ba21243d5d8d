"""Images per second of a node's training loop, against a plain diffusers + accelerate loop and the machine's limit.

    python benchmarks/throughput.py fashionmnist-28-small cifar10-32-small --out benchmarks/results/throughput.json

Both loops train the same architecture on the same images with the same batch, precision and optimizer, in turns in this
process, and the medians are compared. The plain one is written after diffusers' train_unconditional.py, without its
files and logging, from a data loader of tensors. The limit is the rate of a large matrix product, in the precision
of the training; the FLOPs of a step are counted by torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from feddm_flwr.compute import precision
from feddm_flwr.compute.device import prepare_process
from feddm_flwr.config import RunConfig, parse
from feddm_flwr.models import networks, pipelines
from feddm_flwr.training import examples, loop, objectives


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "presets", nargs="+", help="model.preset: fashionmnist-28, cifar10-32-small, lsun-church-256 (on latents), …"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="of a measurement")
    parser.add_argument("--times", type=int, default=5, help="measurements of each loop")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="train.compile too, on a GPU, also with channels last")
    parser.add_argument("--private", action="store_true", help="privacy.mechanism = dp-sgd, too")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: every core")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    results = {}
    for preset in options.presets:
        results[preset] = found = measure(preset, options)
        limit = f"of the matmul rate ({found['matmul TFLOP/s']:.3g} TFLOP/s)"
        for name, rate in found["images per second"].items():
            print(
                f"{preset}, batch {options.batch}, {found['precision']}: {name} {rate:.1f} images/s, "
                f"{rate / found['images per second']['plain']:.2f} of plain, "
                f"{100 * found['of matmul rate'][name]:.0f} % {limit}, first {found['first seconds'][name]:.1f} s",
                flush=True,
            )
    if options.out:
        text = {**machine.facts(), "presets": results}
        options.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """All loops on one architecture."""
    size = {"fashionmnist": 28, "cifar10": 32, "celeba": 64, "lsun": 32}[preset.partition("-")[0]]
    config = parse(
        {
            "data.name": "none",
            "data.image-size": size,
            "data.channels": 1 if size == 28 else 3,
            "model.preset": preset,
            "train.local-steps": options.steps,
            "train.batch-size": options.batch,
            "train.precision": options.precision,
            "train.threads": options.threads,
            "diffusion.prediction": "epsilon",
            "diffusion.schedule": "linear",
        }
    )
    if preset.startswith("lsun"):  # its latents, which nothing is asked of here but their shape
        config = replace(config, data=replace(config.data, channels=4))
    device = prepare_process(config.train)
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch * options.steps, config.data.channels, size, size), np.uint8
    )
    pixels = examples.Pixels(images, False, device)
    ours = {"ours": config}
    if device.type == "cuda":
        ours["launched one by one"] = replace(config, train=replace(config.train, cuda_graph=False))
    if options.compile:
        ours["compiled"] = replace(config, train=replace(config.train, compile=True))
        ours["compiled, channels last"] = ours["compiled"]
    if options.private:
        ours["private"] = replace(config, privacy=replace(config.privacy, mechanism="dp-sgd", noise_multiplier=1.0))
    bf16 = precision.in_bf16(options.precision, device)
    runs: dict[str, Callable[[int], object]] = {}
    for name, own in ours.items():
        network = networks.build(own, {}).to(device)
        if "channels last" in name:
            network = network.to(memory_format=torch.channels_last)
        denoising = objectives.Denoising(own, pixels, np.zeros(len(images), np.int64), device)
        runs[name] = partial(ours_once, network, denoising, own, device)
    flops = flops_of_a_step(network, denoising) / options.batch
    runs["plain"] = Plain(config, images, "bf16" if bf16 else "no").epoch
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(options.times + 1):
        for name, run in runs.items():
            start = time.monotonic()
            run(i + 1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.monotonic() - start)
    rates = {name: len(images) / statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    limit = matmul_rate(device, bf16)
    return {
        "images per second": rates,
        "over plain": {name: rates[name] / rates["plain"] for name in ours},
        "of matmul rate": {name: rate * flops / limit for name, rate in rates.items()},
        "first seconds": {name: times[0] for name, times in seconds.items()},
        "GFLOP per image": flops / 1e9,
        "matmul TFLOP/s": limit / 1e12,
        "precision": "bf16" if bf16 else "fp32",
        "batch": options.batch,
        "peak GPU memory GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def ours_once(network: Any, denoising: objectives.Denoising, config: RunConfig, device: torch.device, i: int) -> None:
    """A round's training, of which recording and the check of what was compiled are part."""
    progress = loop.Progress(i, 0)
    loop.train(network, denoising, config, "node", progress, device, noise=config.privacy.noise_multiplier)


class Plain:
    """A plain loop."""

    def __init__(self, config: RunConfig, images: np.ndarray[Any, Any], precision: str) -> None:
        own = dict(networks.build(config, {}).config)
        network = UNet2DModel.from_config(own)
        optimizer = torch.optim.AdamW(network.parameters(), config.train.learning_rate, weight_decay=0.0)
        x = torch.from_numpy(images).float() / 127.5 - 1
        loader = DataLoader(TensorDataset(x), config.train.batch_size, shuffle=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, 20, 10_000)
        self.accelerator = Accelerator(mixed_precision=precision)
        self.network, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            network, optimizer, loader, schedule
        )
        self.noise = pipelines.noise_scheduler(config)

    def epoch(self, _: int = 0) -> None:
        """Every image once."""
        self.network.train()
        for (clean,) in self.loader:
            noise = torch.randn_like(clean)
            t = torch.randint(0, self.noise.config.num_train_timesteps, (len(clean),), device=clean.device).long()
            noisy = self.noise.add_noise(clean, noise, t)
            predicted = self.network(noisy, t).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            loss.detach().item()


def flops_of_a_step(network: Any, objective: objectives.Denoising) -> int:
    """Of forward and backward pass on a batch."""
    device = next(network.parameters()).device
    index = torch.arange(objective._config.train.batch_size, device=device)
    drawn = objective.draw(index, torch.Generator(device).manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        objective.losses(network, drawn).mean().backward()
    network.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large matrix product: the machine's limit."""
    size = 8192 if device.type == "cuda" else 2048
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as convolutions do
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    times = []
    for _ in range(6):
        start = time.monotonic()
        for _ in range(20 if device.type == "cuda" else 1):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.monotonic() - start) / (20 if device.type == "cuda" else 1))
    return 2 * size**3 / min(times)


if __name__ == "__main__":
    main()
