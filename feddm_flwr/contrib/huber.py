"""An objective: the pseudo-Huber loss."""

from __future__ import annotations

from torch import Tensor

from feddm_flwr.training.objectives import Denoising


class Huber(Denoising):
    """The pseudo-Huber denoising loss (Song and Dhariwal 2023, arXiv 2310.14189, section 3.3), which outliers move less
    than they do the squared error."""

    def distance(self, prediction: Tensor, goal: Tensor) -> Tensor:
        c = 0.00054 * goal[0].numel() ** 0.5
        distance: Tensor = ((prediction - goal).square().flatten(1).sum(1) + c * c).sqrt() - c
        return distance
