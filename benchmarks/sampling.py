"""What fewer sampling steps cost: images per second, FID and KID of each scheduler, against DDPM's 1000 steps.

    python benchmarks/sampling.py RUN -c 'data.name="test.parquet"' --samples 512 --out benchmarks/results/sampling.json

RUN is the folder of a run without classes; its samples are compared with its images, or those that -c names, by the
features of a classifier. All schedulers start from the same noise. The change against the first case, which is DDPM
unless --without-ddpm, is that of the KID, which does not depend on the number of samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch

from feddm_flwr.cli import trained_model
from feddm_flwr.cli.arguments import run_config_keys
from feddm_flwr.config import parse
from feddm_flwr.data import node_data
from feddm_flwr.data.images import Images
from feddm_flwr.evaluation import features, sampling, scores
from feddm_flwr.models import pipelines
from feddm_flwr.storage.state_folder import state_root

CASES = [("ddpm", 1000), ("ddim", 100), ("ddim", 50), ("ddim", 25), ("ddim", 10)] + [
    (name, steps) for name in ("dpmsolver++", "unipc") for steps in (25, 15, 10, 5)
]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("-c", "--run-config", action="append", default=[])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--spacing", choices=("leading", "trailing"), help="of the steps; default: the model's own")
    parser.add_argument("--without-ddpm", action="store_true", help="which takes two thirds of the time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: every core")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    config = parse(run_config_keys([str(options.run / "config.toml"), *options.run_config]))
    real, classes, _ = node_data.load_all(config.data)
    network = features.recipe("classifier", config.data.channels, lambda: (real, classes), state_root(None)).build()
    told, rows = network(real), list[dict[str, Any]]()
    pipeline = pipelines.load(trained_model.find(options.run))
    if pipelines.autoencoder(pipeline) is not None or pipelines.class_names(pipeline):
        sys.exit("this benchmark is for models of pixels without classes")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    process = dict(pipeline.scheduler.config)
    process["timestep_spacing"] = options.spacing or process["timestep_spacing"]

    def draw(count: int, scheduler: str, steps: int) -> Images:
        return sampling.sample(pipeline.unet, process, count, steps, 0, scheduler=scheduler, batch_size=128)

    for scheduler, steps in CASES[options.without_ddpm :]:
        draw(128, scheduler, 2)  # warms up
        start = time.monotonic()
        fake = draw(options.samples, scheduler, steps)
        rate = options.samples / (time.monotonic() - start)
        found = scores.compare(told, network(fake), 0, classes, network.logits)
        row = {"scheduler": scheduler, "steps": steps, "images_per_second": rate}
        rows.append(row | {key: found[key] for key in ("fid", "kid", "kid_std", "coverage") if key in found})
        first, last = rows[0], rows[-1]
        spread = f" ± {last['kid_std']:.3f}" if last["kid_std"] is not None else ""
        print(
            f"{scheduler:12s} {steps:5d} steps {rate:8.2f} images/s ({rate / first['images_per_second']:6.1f}x)"
            f"   FID {last['fid']:8.3f}   KID {last['kid']:8.3f}{spread}"
            f"   change {last['kid'] - first['kid']:+.3f}",
            flush=True,
        )
    if options.out:
        facts = {**machine.facts(), "samples": options.samples}
        facts |= {
            "spacing": process["timestep_spacing"],
            "run": options.run.name,
            "real": len(real),
            "features": network.name,
        }
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
