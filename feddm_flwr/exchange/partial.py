"""Which parameters travel: all of them, or parts of the U-Net.

After FedDiffuse (de Goede et al. 2024, arXiv 2406.12575), whose schemes keep parts of the U-Net on the
nodes or let each node send only a part. That time and class embeddings go with the decoder, which
the nodes share in every scheme, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from feddm_flwr.config import ConfigError, RunConfig, derive_seed
from feddm_flwr.vector import Layout, Vector

#: Parameters of a diffusers U-Net by the beginning of their names.
_ENCODER = ("conv_in.", "down_blocks.")
_BOTTLENECK = ("mid_block.",)
#: What stays on the nodes.
_PERSONAL = {"full": (), "usplit": (), "ulatdec": _ENCODER, "udec": _ENCODER + _BOTTLENECK}
ALL = "all"


@dataclass(frozen=True)
class Subset:
    """Some of the parameters of a larger layout, in its order."""

    layout: Layout
    slices: tuple[slice, ...]  # where they are in the larger vector

    def take(self, vector: Vector) -> Vector:
        """Returns their values, from the larger vector."""
        return np.concatenate([vector[s] for s in self.slices]) if self.slices else np.zeros(0, np.float32)

    def put(self, values: Vector, vector: Vector) -> None:
        """Writes their values into the larger vector."""
        start = 0
        for s in self.slices:
            vector[s] = values[start : (start := start + s.stop - s.start)]


@dataclass(frozen=True)
class Split:
    """How a model's parameters are shared out."""

    shared: Subset  # of the model: what server and nodes exchange
    personal: Subset  # of the model: what stays on each node
    sent: dict[str, Subset]  # of the shared: what a reply covers, by name

    def join(self, values: dict[str, Vector]) -> Vector:
        """Returns the shared vector, of its sent parts' values; not copied where one part is all of it."""
        if len(values) == 1:
            return next(iter(values.values()))
        vector = np.empty(self.shared.layout.size, np.float32)
        for name, part in self.sent.items():
            part.put(values[name], vector)
        return vector


def split_of(layout: Layout, config: RunConfig) -> Split:
    """Returns the parts that the configuration asks for.

    Raises:
        ConfigError: a pattern matches no parameter, or every parameter is personal.
    """
    patterns = [p.strip() for p in config.exchange.personal.split(",") if p.strip()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layout.names):
            some = ", ".join(layout.names[:: max(1, len(layout.names) // 4)])
            raise ConfigError(
                f"exchange.personal = {config.exchange.personal!r}: {pattern!r} matches no parameter; "
                f"there are {len(layout.names)}, such as {some}"
            )
    personal = {
        name
        for name in layout.names
        if name.startswith(_PERSONAL[config.exchange.parts]) or any(fnmatchcase(name, p) for p in patterns)
    }
    shared = _part(layout, {*layout.names} - personal)
    if not shared.layout.names:
        raise ConfigError(f"exchange.personal = {config.exchange.personal!r}: no parameter would be exchanged")
    sent = {ALL: _part(shared.layout, {*shared.layout.names})}
    if config.exchange.parts == "usplit":
        encoder = {name for name in shared.layout.names if name.startswith(_ENCODER)}
        sent = {
            "encoder": _part(shared.layout, encoder),
            "rest": _part(shared.layout, {*shared.layout.names} - encoder),
        }
        if not all(part.layout.names for part in sent.values()):
            raise ConfigError("exchange.personal leaves exchange.parts = 'usplit' with nothing to split: use 'full'")
    return Split(shared, _part(layout, personal), sent)


def assign(split: Split, names: list[str], config: RunConfig, number: int) -> dict[str, str]:
    """Returns which part each of the nodes sends in a round: as many each as can be, by the seed."""
    order = np.random.default_rng(derive_seed(config.seed, "parts", number)).permutation(len(names))
    kinds = [*split.sent]
    return {names[node]: kinds[(place + number) % len(kinds)] for place, node in enumerate(order)}


def _part(layout: Layout, names: set[str]) -> Subset:
    """Returns the named parameters of a layout; neighbours share a slice."""
    slices: list[slice] = []
    chosen, start = [], 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        stop = start + int(np.prod(shape))
        if name in names:
            chosen.append((name, shape))
            if slices and slices[-1].stop == start:
                slices[-1] = slice(slices[-1].start, stop)
            else:
                slices.append(slice(start, stop))
        start = stop
    return Subset(Layout(tuple(n for n, _ in chosen), tuple(s for _, s in chosen)), tuple(slices))
