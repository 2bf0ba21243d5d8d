"""Whether a model gives back the images that it was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_A_TIME = 4096


_QUANTILE = 0.01  # of unseen images that are as near to a training image by chance


def near_copies(samples: Tensor, trained: Tensor, unseen: Tensor) -> int:
    """Returns how many samples are nearer to a training image, by their features (N, D), than all but one in a hundred
    real images are that the model never saw."""
    chance = _nearest(unseen, trained).quantile(_QUANTILE)
    return int((_nearest(samples, trained) <= chance).sum())


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Returns the distance of each point to the nearest of the others, exactly 0 for the same."""
    exactly = "donot_use_mm_for_euclid_dist"
    parts = (torch.cdist(points.double(), part.double(), compute_mode=exactly) for part in others.split(_AT_A_TIME))
    return torch.stack([part.min(1).values for part in parts]).min(0).values


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
