"""How good are the digits of a run? `python benchmarks/digits_quality.py RUN/model`

Three figures on 300 samples, against scikit-learn's real digits (8x8 pixels), and the same for
uniform noise, which must score 0:

- near: share of samples whose distance to the nearest training digit is at most the 95th percentile
  of that distance for real digits that were held out (by that definition real digits score 0.95);
- classes: how many of the ten classes a classifier trained on the real digits sees in the samples;
- copies: share of samples closer to a training digit than 1 % of the held-out digits are.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

from feddm_flwr.config import parse
from feddm_flwr.data.node_data import Images, load_all


def score(samples: Images) -> dict[str, float | list[int]]:
    """The figures for uint8 samples (N, 1, 8, 8)."""
    train, labels, _ = load_all(parse({"data.split": "train"}).data)
    test, test_labels, _ = load_all(parse({"data.split": "test"}).data)
    real, held_out, made = (x.reshape(len(x), -1) / 255 for x in (train, test, samples))
    nearest = NearestNeighbors(n_neighbors=1).fit(real)
    near = nearest.kneighbors(held_out)[0][:, 0]
    distance = nearest.kneighbors(made)[0][:, 0]
    classifier = SVC(gamma="scale", C=10).fit(real, labels)
    counts = [int((classifier.predict(made) == str(c)).sum()) for c in range(10)]
    return {
        "near": float((distance <= np.quantile(near, 0.95)).mean()),
        "copies": float((distance < np.quantile(near, 0.01)).mean()),
        "classes": float(np.count_nonzero(counts)),
        "samples_per_class": counts,
        "classifier_accuracy": float(classifier.score(held_out, test_labels)),
    }


def main() -> None:
    import torch
    from diffusers import DDIMScheduler, DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(sys.argv[1])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(300, torch.Generator().manual_seed(0), num_inference_steps=50, output_type="np").images
    samples = np.round(made * 255).astype(np.uint8).transpose(0, 3, 1, 2)
    noise = np.random.default_rng(0).integers(0, 256, samples.shape, dtype=np.uint8)
    print(json.dumps({"samples": score(samples), "uniform noise": score(noise)}, indent=2))


if __name__ == "__main__":
    main()
