"""What nodes' optimizers tell each other of the round before: second moments, and Muon's momentum.

A node's optimizer begins every round without memory. Second moments of AdamW are averaged as a mean for each output
channel of each parameter, some kilobytes (after FedAdamW, arXiv 2510.27486, whose blocks are larger). Muon's momentum
is as large as the model and travels in ternary values, with a scale for each block: it is made orthogonal before it
moves a weight, so that its direction is what counts. Both are of the shared parameters only: what stays on a node does
so with its moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from feddm_flwr.codecs.floating import BFloat16
from feddm_flwr.codecs.framing import Frame
from feddm_flwr.codecs.grid import Int2
from feddm_flwr.config import RunConfig
from feddm_flwr.exchange.channel import Channel, FrameError
from feddm_flwr.protocol.tasks import MOMENTS, MOMENTUM
from feddm_flwr.vector import Layout, Vector, euclidean_norm

#: By name of its frame; those of all shared parameters are one vector each.
Moments = dict[str, Vector]

#: Second moments above this are a broken node's: gradients are clipped to a norm.
_ABSURD = 1e6
_SLACK = 2.0  # how far beyond the clipped gradients' norm a coded momentum's may be


def channels(shape: tuple[int, ...]) -> int:
    """Returns how many means there are of a parameter: one for each output channel."""
    return shape[0] if shape else 1


def has_momentum(shape: tuple[int, ...]) -> bool:
    """Tells whether a parameter of this shape is Muon's, where that is the optimizer: a weight of two and more
    dimensions."""
    return len(shape) >= 2


class MomentsChannel:
    """Both ends of both ways."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        """Carries the moments of the parameters of a layout."""
        by_muon = config.train.optimizer == "muon"
        self._most = _SLACK * config.train.max_grad_norm
        means = sum(channels(shape) for shape in layout.shapes if not (by_muon and has_momentum(shape)))
        momentum = sum(int(np.prod(shape)) for shape in layout.shapes if by_muon and has_momentum(shape))
        self._channels = {MOMENTS: Channel(BFloat16(), f"{layout.fingerprint}/{MOMENTS}", means)}
        if momentum:
            self._channels[MOMENTUM] = Channel(Int2(), f"{layout.fingerprint}/{MOMENTUM}", momentum)

    @property
    def sizes(self) -> dict[str, int]:
        """Values of each frame."""
        return {name: channel.size for name, channel in self._channels.items()}

    def encode(self, moments: Moments, number: int) -> dict[str, bytes]:
        """Returns the frames of round `number`.

        Raises:
            ValueError: a value is not finite.
        """
        return {name: channel.encode(moments[name], name, number) for name, channel in self._channels.items()}

    def decode(self, frames: Mapping[str, bytes], number: int) -> Moments:
        """Returns what is in the frames of round `number`.

        Raises:
            FrameError: one is corrupt, or of another round or model, or what is in it can be no moments.
        """
        found = {name: channel.decode(frames[name], name, number) for name, channel in self._channels.items()}
        if not ((found[MOMENTS] >= 0) & (found[MOMENTS] <= _ABSURD)).all():
            raise FrameError(f"second moments must be from 0 to {_ABSURD:g}")
        if MOMENTUM in found and (norm := euclidean_norm(found[MOMENTUM])) > self._most:
            raise FrameError(f"a momentum of norm {norm:.3g}; gradients are clipped to {self._most / _SLACK:g}")
        return found

    def momentum_chunks(self, frame: Frame, number: int) -> Iterator[Vector]:
        """Yields the momentum in a frame of round `number`, one chunk after the other."""
        return self._channels[MOMENTUM].decode_chunks(frame, MOMENTUM, number)


def mean_of_nodes(named: Iterable[tuple[str, int, Vector]], *, robust: bool) -> Vector:
    """Returns what the second moments of nodes, with their names and numbers of images, come to: the mean weighted by
    images, summed in order of name so that its bits are fixed, or where the aggregation is `robust` the median."""
    ordered = sorted(named, key=lambda node: node[0])
    if robust:
        median: Vector = np.median([means for _, _, means in ordered], axis=0).astype(np.float32)
        return median
    total = np.zeros(len(ordered[0][2]))
    for _, images, means in ordered:
        total += means * np.float64(images)
    mean: Vector = (total / sum(images for _, images, _ in ordered)).astype(np.float32)
    return mean
