"""Second moments of AdamW on their way between nodes and server: a mean for each output channel of each parameter.

A node's optimizer begins every round without memory; these kilobytes tell it how large gradients are (after FedAdamW,
arXiv 2510.27486, whose blocks are larger). They are of the shared parameters only: what stays on a
node does so with its moments.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from feddm_flwr.codecs.floating import BFloat16
from feddm_flwr.exchange.channel import Channel, FrameError
from feddm_flwr.protocol.tasks import MOMENTS
from feddm_flwr.vector import Layout, Vector

#: Above this they are a broken node's: gradients are clipped to a norm.
_ABSURD = 1e6


def channels(shape: tuple[int, ...]) -> int:
    """Returns how many means there are of a parameter: one for each output channel."""
    return shape[0] if shape else 1


class MomentsChannel:
    """Both ends of both ways."""

    def __init__(self, layout: Layout) -> None:
        """Carries the moments of the parameters of a layout."""
        size = sum(map(channels, layout.shapes))
        self._channel = Channel(BFloat16(), f"{layout.fingerprint}/{MOMENTS}", size)

    @property
    def size(self) -> int:
        """Means of all parameters."""
        return self._channel.size

    def encode(self, means: Vector, number: int) -> bytes:
        """Returns the frame of round `number`.

        Raises:
            ValueError: a mean is not finite.
        """
        return self._channel.encode(means, MOMENTS, number)

    def decode(self, frame: bytes, number: int) -> Vector:
        """Returns the means in a frame of round `number`.

        Raises:
            FrameError: it is corrupt, or of another round or model, or what is in it can be no second moments.
        """
        means = self._channel.decode(frame, MOMENTS, number)
        if not ((means >= 0) & (means <= _ABSURD)).all():
            raise FrameError(f"second moments must be from 0 to {_ABSURD:g}")
        return means


def mean_of_nodes(named: Iterable[tuple[str, int, Vector]], *, robust: bool) -> Vector:
    """Returns what the moments of nodes, with their names and numbers of images, come to: the mean weighted by images,
    summed in order of name so that its bits are fixed, or where the aggregation is `robust` the median."""
    ordered = sorted(named, key=lambda node: node[0])
    if robust:
        median: Vector = np.median([means for _, _, means in ordered], axis=0).astype(np.float32)
        return median
    total = np.zeros(len(ordered[0][2]))
    for _, images, means in ordered:
        total += means * np.float64(images)
    mean: Vector = (total / sum(images for _, images, _ in ordered)).astype(np.float32)
    return mean
