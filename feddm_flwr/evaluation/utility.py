"""What samples are good for: a classifier that was trained on them, tested on real images; and how many real images
have a sample near them."""

from __future__ import annotations

import torch
from torch import Tensor

from feddm_flwr.config import derive_seed
from feddm_flwr.data.images import Images
from feddm_flwr.data.node_data import Labels
from feddm_flwr.evaluation.features import Recipe, fit

_STEPS = 600  # at least, so that few images are seen as often as it takes
_BATCH = 128
_EPOCHS = 4
#: Nodes have different numbers of images: so many are looked at, at most, for what is compared among them.
LOOKED_AT = 256
_NEIGHBOUR = 5


def classifier(images: Images, labels: Labels, names: tuple[str, ...]) -> Recipe:
    """Returns a small classifier of images (N, C, H, W) with these labels, places in `names`. However many they are, it
    is trained in the same way."""
    epochs = max(_EPOCHS, -(-_STEPS // -(-len(images) // _BATCH)))
    network = fit(images, labels, len(names), epochs, derive_seed("utility"))
    facts = {"kind": "classifier", "name": "utility", "channels": images.shape[1], "classes": [*names]}
    return Recipe(facts, network.state_dict())


def right(made: Recipe, images: Images, labels: Labels) -> int:
    """Returns how many images the classifier gets right."""
    network = made.build()
    assert network.logits
    return int((network.logits(network(images)).argmax(1).numpy() == labels).sum())


def covered(real: Tensor, samples: Tensor) -> int:
    """Returns how many real images have a sample nearer, by their features (N, D), than their fifth nearest real image
    (coverage, Naeem et al. 2020, arXiv 2002.09797)."""
    neighbour = min(_NEIGHBOUR, len(real) - 1)
    if not neighbour:
        return 0
    exactly = "donot_use_mm_for_euclid_dist"
    real, samples = real.double(), samples.double()
    radius = (
        torch.cdist(real, real, compute_mode=exactly).kthvalue(neighbour + 1, dim=1).values
    )  # it is its own nearest
    return int((torch.cdist(real, samples, compute_mode=exactly).min(1).values <= radius).sum())
