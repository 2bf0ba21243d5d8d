"""Updates as whole numbers whose sum is all that the server learns (codec.uplink = "sum").

Every node rounds to the same grid, so that the digits of all nodes add up: per block of values one step, which the
server finds from the sums of earlier rounds. A round takes some of the blocks, the same of every node; what it leaves
out, and what rounding loses, stays with the node (error feedback, see `exchange.uplink`).

A node's digits are its update times its share of the images, over the step: ternary where all nodes have as many
images, with more digits where a node has more than the others. Beside them, in the same sum, go the nodes' scales of
each block, on a scale of logarithms, and a few figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from feddm_flwr.codecs import framing
from feddm_flwr.codecs.floating import BFloat16
from feddm_flwr.codecs.sums import pack, unpack, words_of
from feddm_flwr.config import NOISE_LEVELS, RunConfig, derive_seed, flatten
from feddm_flwr.exchange.channel import Channel
from feddm_flwr.protocol.tasks import TrainTask
from feddm_flwr.vector import Vector, Words

#: A step over the mean magnitude of a block. Values above the mean are not 0, as with `int2`: 1.75 times the mean is
#: the mean of those, of normally distributed values.
_LEVEL = 1.75
_ROUNDING = np.float32(1 - 1 / _LEVEL)  # added before digits are cut off
#: Scales go as whole numbers of halves of an octave, to so many of the expected one.
_OCTAVE, _LOWEST, _HIGHEST = 2, -8, 7
_SCALES = _HIGHEST - _LOWEST
_LARGEST = 100  # digit, of a node with a hundred times the images of the others
_STEPS = "steps"  # the frame's content
_FRACTION = 20  # bits of a figure after the point
_MOST = 1000.0  # of a figure


@dataclass(frozen=True)
class Figures:
    """What is told of a training in the sum; each a mean over the nodes, weighted as it is named."""

    train_loss: float  # by images
    coding_error: float  # the same
    eval_loss: float  # by held-out images; NaN where no node has measured it
    eval_levels: list[float]  # the same; empty where not told


_FIGURES = 5 + NOISE_LEVELS


def _figure_words(figures: Figures, images: int, held_out: int) -> Words:
    levels = figures.eval_levels
    evaluated = held_out if math.isfinite(figures.eval_loss) else 0
    apart = evaluated if levels and all(map(math.isfinite, levels)) else 0  # few images are not of every level
    values = [
        figures.train_loss * images,
        figures.coding_error * images,
        figures.eval_loss * evaluated if evaluated else 0.0,
        evaluated,
        apart,
        *((level * apart for level in levels) if apart else [0.0] * NOISE_LEVELS),
    ]
    most = _MOST * max(images, held_out, 1)
    return np.array([round(min(max(v, 0.0), most) * (1 << _FRACTION)) for v in values], np.uint64)


def _figures(words: Words, images: int) -> Figures:
    trained, lost, loss, evaluated, apart, *levels = (int(word) / (1 << _FRACTION) for word in words)
    told = [level / apart for level in levels] if apart else []
    return Figures(trained / images, lost / images, loss / evaluated if evaluated else math.nan, told)


@dataclass(frozen=True)
class Share:
    """What a node's update weighs in the sum."""

    factor: float  # its images over the mean of all
    largest: int  # digit


def shares_of(config: RunConfig, images: Mapping[str, int]) -> dict[str, Share]:
    """Returns the shares of nodes with so many images, by `server.weights`."""
    weights = dict.fromkeys(images, 1) if config.server.weights == "equal" else images
    mean = sum(weights.values()) / len(weights)
    return {name: Share(count / mean, min(max(1, round(count / mean)), _LARGEST)) for name, count in weights.items()}


class SumGrid:
    """What all nodes of a round share: which blocks are sent, and how words are laid out."""

    def __init__(self, config: RunConfig, size: int, number: int, shares: Mapping[str, Share]) -> None:
        """Is of round `number`, for vectors of `size` values, of nodes with these shares."""
        self._size, self._block, self._shares = size, config.codec.block_size, shares
        self._blocks = -(-size // self._block)
        phases = np.random.default_rng(derive_seed(config.seed, "blocks")).random(self._blocks)
        reached = np.floor(number * config.codec.sum_share + phases)
        self.never_sent: NDArray[np.bool_] = reached < 1  # by block, this round included
        self.sent = np.flatnonzero(reached > np.floor((number - 1) * config.codec.sum_share + phases))
        self._base = 2 * sum(share.largest for share in shares.values()) + 1
        self._scale_base = _SCALES * len(shares) + 1
        self._digits = words_of(len(self.sent) * self._block, self._base)
        self._scales = words_of(len(self.sent), self._scale_base)

    @property
    def words(self) -> int:
        """How many words a node sends."""
        return self._digits + self._scales + _FIGURES

    def encode(self, vector: Vector, scales: Vector, name: str) -> tuple[Words, Vector]:
        """Returns what a node sends of a vector, without its figures, and what that stands for; `scales` are the
        expected mean magnitudes of the blocks that are sent."""
        share = self._shares[name]
        blocks = np.zeros((self._blocks, self._block), np.float32)
        blocks.reshape(-1)[: self._size] = vector
        chosen = blocks[self.sent]
        steps = (np.float32(_LEVEL / share.factor) * scales)[:, None]
        digits = chosen / steps
        digits += np.copysign(_ROUNDING, digits)
        np.trunc(digits, out=digits)
        np.clip(digits, -share.largest, share.largest, out=digits)
        blocks.fill(0)
        blocks[self.sent] = digits * steps
        with np.errstate(divide="ignore"):
            octaves = np.log2(np.abs(chosen).mean(1) / scales)
        codes = np.clip(np.rint(_OCTAVE * octaves), _LOWEST, _HIGHEST) - _LOWEST
        packed = pack((digits + share.largest).astype(np.uint8).reshape(-1), self._base)
        return np.concatenate([packed, pack(codes, self._scale_base)]), blocks.reshape(-1)[: self._size]

    def with_figures(self, words: Words, figures: Figures, images: int, held_out: int) -> Words:
        """Returns the words of a node with so many images, with its figures at the end."""
        return np.concatenate([words, _figure_words(figures, images, held_out)])

    def decode(
        self, total: Words, scales: Vector, images: Mapping[str, int]
    ) -> tuple[Vector, NDArray[np.float64], Figures]:
        """Returns what the sum over the nodes with these images came to: the mean update, weighted by images; by block
        that was sent the mean of the nodes' scales, in octaves over the expected one; the means of figures.

        Raises:
            ValueError: it is the sum of something else.
        """
        names = [*images]
        digits = unpack(total[: self._digits], self._base, len(self.sent) * self._block)
        codes = unpack(total[self._digits : -_FIGURES], self._scale_base, len(self.sent))
        largest = sum(self._shares[name].largest for name in names)
        if digits.max(initial=0) > 2 * largest or codes.max(initial=0) > _SCALES * len(names):
            raise ValueError("sums of digits that are too large")
        blocks = np.zeros((self._blocks, self._block), np.float32)
        weight = sum(self._shares[name].factor for name in sorted(names))
        steps = np.float32(_LEVEL / weight) * scales
        blocks[self.sent] = (digits - largest).reshape(-1, self._block).astype(np.float32) * steps[:, None]
        octaves = (codes / len(names) + _LOWEST) / _OCTAVE
        return blocks.reshape(-1)[: self._size], octaves, _figures(total[-_FIGURES:], sum(images.values()))


class Scales:
    """The server's knowledge of how large the blocks of an update are."""

    def __init__(self, config: RunConfig, size: int, layout: str) -> None:
        """Begins with a guess, which a few rounds put right."""
        self.layout = layout
        t = config.train
        steps = t.local_steps or 100
        warm = min(1.0, steps / (2 * t.warmup_steps)) if t.warmup_steps else 1.0  # of the learning rate, in the mean
        guess = t.learning_rate * warm * math.sqrt(steps) / 2
        self.values: Vector = np.full(-(-size // config.codec.block_size), guess, np.float32)

    def frame(self, grid: SumGrid, number: int) -> tuple[bytes, Vector]:
        """Returns the frame that tells the nodes of a round the scales of the blocks that are sent, and what they make
        of it."""
        return _steps_channel(self.layout, len(grid.sent)).code(self.values[grid.sent], _STEPS, number)

    def learn(self, grid: SumGrid, octaves: NDArray[np.float64]) -> None:
        """Takes in what a round found; blocks that were never sent are expected to be off by as much as those."""
        values = self.values.astype(np.float64)
        if len(octaves):
            values[grid.never_sent] *= 2.0 ** float(octaves.mean())
        values[grid.sent] *= 2.0**octaves
        self.values = np.clip(values, 1e-30, 1e30).astype(np.float32)


class SumSender:
    """A node's end: what `exchange.uplink` takes for a channel."""

    def __init__(self, grid: SumGrid, scales: Vector, name: str) -> None:
        """Sends as node `name`, given the scales of the blocks that are sent."""
        self._grid, self._scales, self._name = grid, scales, name

    def code(self, vector: Tensor, content: str, number: int, seed: int = 0) -> tuple[bytes, Vector]:
        """Returns the words of a vector as bytes, and what they stand for."""
        words, decoded = self._grid.encode(vector.cpu().numpy(), self._scales, self._name)
        return words.tobytes(), decoded


def scales_in(frame: bytes, grid: SumGrid, number: int, layout: str) -> Vector:
    """Returns the scales in a `Scales.frame`.

    Raises:
        FrameError: it is corrupt, or of something else.
    """
    return _steps_channel(layout, len(grid.sent)).decode(frame, _STEPS, number)


def _steps_channel(layout: str, size: int) -> Channel:
    return Channel(BFloat16(), f"{layout}/{_STEPS}", size)


def facts_of(config: RunConfig, task: TrainTask, weights: str, frame: bytes) -> dict[str, Any]:
    """Returns what the digits of a round go by, the same of every node: the configuration, what was asked, the
    fingerprint of the weights that training begins with, and the frame of the scales."""
    return task.facts() | {"config": flatten(config), "weights": weights, "scales": sha256(frame).hexdigest()}


def write_words(words: Words, layout: str, number: int) -> bytes:
    """Returns the frame of a node's words in round `number`."""
    header = framing.Header("sum", "sum", layout, number, len(words), {})
    pieces = (words[start : start + framing.CHUNK] for start in range(0, len(words), framing.CHUNK))
    return framing.write(header, ([piece.astype("<u8").tobytes()] for piece in pieces))


def read_words(frame: bytes, layout: str, number: int, size: int) -> Words:
    """Returns the words in a frame of round `number`.

    Raises:
        FrameError: the frame is corrupt, or of something else.
    """
    header, offset = framing.read_header(frame)
    if header != (wanted := framing.Header("sum", "sum", layout, number, size, {})):
        raise framing.FrameError(f"the frame is {header}, not {wanted}")
    chunks = framing.read_chunks(frame, offset, size, lambda count: [8 * count])
    content = b"".join(plane for (plane,) in chunks)
    if len(content) != 8 * size:
        raise framing.FrameError(f"{len(content)} bytes do not hold {size} words")
    return np.frombuffer(content, "<u8")
