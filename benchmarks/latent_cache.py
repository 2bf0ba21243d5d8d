"""What it saves to encode a node's images once: seconds of a local step on kept latents, and with the encoder in it.

    python benchmarks/latent_cache.py --out benchmarks/results/latent_cache.json

The preset's autoencoder and U-Net, 256x256 random images, both kinds of step in turns in one process, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import torch

from feddm_flwr.config import parse
from feddm_flwr.models import networks
from feddm_flwr.models.autoencoder import load_autoencoder
from feddm_flwr.models.pretrained import AUTOENCODER, fetch
from feddm_flwr.training import examples, objectives


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="lsun-church-256-small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        keys = {"data.name": "none", "data.image-size": 256, "data.channels": 3, "model.preset": options.preset}
        first = networks.build(parse({**keys, "stage": "autoencoder"}), {})
        first.save_pretrained(folder)
        config = parse({**keys, "model.kind": "ldm", "model.autoencoder": folder})
        files = fetch(config, Path(folder) / "assets")
        network = networks.build(config, files).to(device)
        encoder = load_autoencoder(files[AUTOENCODER]).to(device)
    images = np.random.default_rng(0).integers(0, 256, (options.batch, 3, 256, 256), np.uint8)
    pixels = examples.Pixels(images, False, device)
    random, index = torch.Generator(device).manual_seed(0), torch.arange(options.batch, device=device)

    def moments() -> torch.Tensor:
        with torch.no_grad():
            found = encoder.encode(pixels.fixed(index)).latent_dist
        return torch.stack([found.mean, found.std], 1)[:, None]

    kept = moments().half().cpu().numpy()
    seconds: dict[str, list[float]] = {"kept": [], "encoded anew": []}
    for kind in [*seconds] * (options.steps + 1):
        start = time.monotonic()
        of_batch = kept if kind == "kept" else moments().cpu().numpy()
        encoded = examples.Latents(of_batch, encoder.config, device)
        objective = objectives.Denoising(config, encoded, np.zeros(options.batch, np.int64), device)
        objective.losses(network, objective.draw(index, random)).mean().backward()
        network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[kind].append(time.monotonic() - start)
    median = {kind: round(statistics.median(values[1:]), 4) for kind, values in seconds.items()}
    ratio = round(median["encoded anew"] / median["kept"], 2)
    print(f"{options.preset}, {options.batch} images: {median} s a step: {ratio}x")
    if options.out:
        result = {**machine.facts(), "preset": options.preset}
        options.out.write_text(json.dumps({**result, "seconds": median, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
