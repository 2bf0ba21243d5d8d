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

from feddm_flwr import architecture, objectives, pipelines, training
from feddm_flwr.config import RunConfig, parse


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", help="model.preset, of pixels: fashionmnist-28, cifar10-32-small, …")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="of a measurement")
    parser.add_argument("--times", type=int, default=5, help="measurements of each loop")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: every core")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    results = {}
    for preset in options.presets:
        results[preset] = found = measure(preset, options)
        print(
            f"{preset}: ours {found['ours']:.1f} images/s, plain {found['plain']:.1f}, ratio {found['ratio']:.3f}; "
            f"{100 * found['of matmul rate']:.0f} % of the matmul rate ({found['matmul TFLOP/s']:.3g} TFLOP/s), "
            f"{found['GFLOP per image']:.3g} GFLOP per image, {found['precision']}",
            flush=True,
        )
    if options.out:
        text = {**machine.facts(), "batch": options.batch, "presets": results}
        options.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both loops on one architecture."""
    size = {"fashionmnist": 28, "cifar10": 32, "celeba": 64}[preset.partition("-")[0]]
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
    device = training.prepare_process(config)
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch * options.steps, config.data.channels, size, size), np.uint8
    )
    ours = architecture.build(config, {}).to(device)
    pixels = objectives.Pixels(images, False, device)
    denoising = objectives.Denoising(config, pixels, np.zeros(len(images), np.int64), device)
    with objectives.autocast(config, device) as _:
        bf16 = torch.is_autocast_enabled(device.type)
    plain = Plain(config, images, "bf16" if bf16 else "no")
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for i in range(options.times + 1):
        for name, run in (
            ("ours", lambda i=i: training.train(ours, denoising, config, "node", training.Progress(i + 1, 0), device)),
            ("plain", plain.epoch),
        ):
            start = time.monotonic()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.monotonic() - start)
    rates = {name: len(images) / statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    flops, limit = flops_of_a_step(ours, denoising) / options.batch, matmul_rate(device, bf16)
    return {
        **rates,
        "ratio": rates["ours"] / rates["plain"],
        "GFLOP per image": flops / 1e9,
        "matmul TFLOP/s": limit / 1e12,
        "of matmul rate": rates["ours"] * flops / limit,
        "precision": "bf16" if bf16 else "fp32",
        "peak GPU memory GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


class Plain:
    """A plain loop."""

    def __init__(self, config: RunConfig, images: np.ndarray[Any, Any], precision: str) -> None:
        own = dict(architecture.build(config, {}).config)
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

    def epoch(self) -> None:
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
