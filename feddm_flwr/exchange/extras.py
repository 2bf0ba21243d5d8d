"""What travels beside the weights, both ways: what optimizers go on with, and SCAFFOLD's control variates.

A node's optimizer begins every round without memory. Second moments of AdamW are averaged as a mean for each output
channel of each parameter, some kilobytes (after FedAdamW, arXiv 2510.27486, whose blocks are larger). Muon's momentum
is as large as the model and travels in ternary values, with a scale for each block: it is made orthogonal before it
moves a weight, so that its direction is what counts. A control variate (Karimireddy et al. 2020, arXiv 1910.06378) is
a mean of gradients, in float32; a node sends how its own has changed. All are of the shared parameters only: what stays
on a node does so with its moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from feddm_flwr.codecs.floating import BFloat16, Identity
from feddm_flwr.codecs.framing import Frame
from feddm_flwr.codecs.grid import Int2
from feddm_flwr.config import RunConfig
from feddm_flwr.exchange.channel import Channel, FrameError
from feddm_flwr.protocol.tasks import CONTROL, MOMENTS, MOMENTUM
from feddm_flwr.vector import Layout, Vector, euclidean_norm

#: Vectors by the names of their frames.
Extras = dict[str, Vector]

_SLACK = 2.0  # how far beyond the clipped gradients' norm a coded momentum's may be, or that of a difference


def channels(shape: tuple[int, ...]) -> int:
    """Returns how many means there are of a parameter: one for each output channel."""
    return shape[0] if shape else 1


def has_momentum(shape: tuple[int, ...]) -> bool:
    """Tells whether a parameter of this shape is Muon's, where that is the optimizer: a weight of two and more
    dimensions."""
    return len(shape) >= 2


class ExtrasChannel:
    """Both ends of both ways."""

    def __init__(self, config: RunConfig, layout: Layout, after: int = 0) -> None:
        """Carries what a round's configuration asks for, of the parameters of a layout; `after` the last round before
        a finish, or of a run that cannot go on, nothing."""
        by_muon = config.train.optimizer == "muon"
        self._most = _SLACK * config.train.max_grad_norm
        means = sum(channels(shape) for shape in layout.shapes if not (by_muon and has_momentum(shape)))
        momentum = sum(int(np.prod(shape)) for shape in layout.shapes if by_muon and has_momentum(shape))
        self._channels: dict[str, Channel] = {}
        of_run = after == config.num_server_rounds and config.train.lr_schedule == "cosine"
        ends = of_run or after == config.before_finish < config.num_server_rounds
        averages = config.train.moments == "server" and not ends
        for name, codec, size in (
            (MOMENTS, BFloat16(), means if averages else 0),
            (MOMENTUM, Int2(), momentum if averages else 0),
            (CONTROL, Identity(), layout.size if config.train.control == "scaffold" and not ends else 0),
        ):
            if size:
                self._channels[name] = Channel(codec, f"{layout.fingerprint}/{name}", size)

    @property
    def sizes(self) -> dict[str, int]:
        """Values of each frame."""
        return {name: channel.size for name, channel in self._channels.items()}

    @property
    def codecs(self) -> dict[str, str]:
        """The codec of each frame."""
        return {name: channel.codec.name for name, channel in self._channels.items()}

    def encode(self, extras: Extras, number: int) -> dict[str, bytes]:
        """Returns the frames of round `number`.

        Raises:
            ValueError: a value is not finite.
        """
        return {name: channel.encode(extras[name], name, number) for name, channel in self._channels.items()}

    def decode(self, frames: Mapping[str, bytes], number: int) -> Extras:
        """Returns what is in the frames of round `number`.

        Raises:
            FrameError: one is corrupt, or of another round or model, or what is in it cannot be.
        """
        found = {
            name: channel.decode(frames[name], name, number)
            for name, channel in self._channels.items()
            if name in frames  # the server has none for the first round
        }
        if MOMENTS in found and not ((found[MOMENTS] >= 0) & (found[MOMENTS] <= self._most**2)).all():
            raise FrameError(f"second moments must be from 0 to {self._most**2:g}; gradients are clipped")
        for name in {MOMENTUM, CONTROL} & {*found}:
            if (norm := euclidean_norm(found[name])) > self._most:
                raise FrameError(f"a {name} of norm {norm:.3g}; gradients are clipped to {self._most / _SLACK:g}")
        return found

    def chunks(self, name: str, frame: Frame, number: int) -> Iterator[Vector]:
        """Yields what is in the frame of that name, of round `number`, one chunk after the other."""
        return self._channels[name].decode_chunks(frame, name, number)


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
