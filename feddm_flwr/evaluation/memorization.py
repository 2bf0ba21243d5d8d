"""Whether a model gives back the images that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_AT_A_TIME = 4096
_QUANTILE = 0.01  # of unseen images that are as near to a training image by chance


def near_copies(samples: Tensor, trained: Tensor, unseen: Tensor) -> int:
    """Returns how many samples are nearer to a training image, by their features (N, D), than all but one in a hundred
    real images are that the model never saw."""
    chance = _nearest(unseen, trained).quantile(_QUANTILE)
    return int((_nearest(samples, trained) <= chance).sum())


@dataclass(frozen=True)
class Nearest:
    """How near samples are to images."""

    distances: Tensor  # (samples,) of each to the nearest image
    places: Tensor  # (samples,) that image's
    copies: int  # samples that are nearer to one than all but one in a hundred images are to another
    by_chance: float  # how many of them are so on average where nothing was copied


def nearest_images(samples: Tensor, images: Tensor) -> Nearest:
    """Returns how near samples are to images, of which it is not known whether they were trained on, by their features
    (N, D)."""
    distances, places = _nearest_two(samples, images)
    others = _nearest_two(images, images)[0][:, 1]  # an image is the nearest to itself
    found = int((distances[:, 0] <= others.quantile(_QUANTILE)).sum())
    return Nearest(distances[:, 0], places[:, 0], found, _QUANTILE * len(samples))


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    return _nearest_two(points, others)[0][:, 0]


def _nearest_two(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distances of each point to the nearest two of the others, exactly 0 for the same, and their places;
    of one other, its own."""
    exactly = "donot_use_mm_for_euclid_dist"
    distances, places, start = list[Tensor](), list[Tensor](), 0
    for part in others.split(_AT_A_TIME):
        own = torch.cdist(points.double(), part.double(), compute_mode=exactly).topk(min(2, len(part)), largest=False)
        distances.append(own.values)
        places.append(own.indices + start)
        start += len(part)
    best = torch.cat(distances, 1).topk(min(2, len(others)), largest=False)
    return best.values, torch.cat(places, 1).gather(1, best.indices)


def near_by_chance(samples: int, unseen: int) -> float:
    """Returns how many samples `near_copies` finds on average where nothing was copied: the quantile of few images is
    itself near to the least of them."""
    return samples * (_QUANTILE * (unseen - 1) + 1) / (unseen + 1)


def separability(members: Tensor, others: Tensor) -> float:
    """Returns how well the loss tells images that were trained on from others: the area under the curve of the attack
    that takes a low loss for membership (Yeom et al. 2018). 0.5 is chance, 1 certainty. Both losses are of the same
    noise levels, in order, and are compared level by level."""
    below = (members < others).double() + 0.5 * (members == others).double()
    return float(below.mean())
