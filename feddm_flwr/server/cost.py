"""What a run will cost each node, said before it begins."""

from __future__ import annotations

import numpy as np

from feddm_flwr.codecs.sums import WORD
from feddm_flwr.config import LEAST_OF_SUM, SUM, RunConfig, nodes_asked
from feddm_flwr.exchange.channel import channel
from feddm_flwr.exchange.extras import ExtrasChannel
from feddm_flwr.exchange.partial import Split
from feddm_flwr.exchange.sums import SumGrid, shares_of

_PROBE = 1 << 20  # values that are coded to see how many bytes they take


def text(config: RunConfig, split: Split, frozen: int) -> str:
    """Returns megabytes that a node sends and gets in a round, and the least memory that training takes beside
    activations: float32 weights and gradients, the optimizer's averages, the received weights where the proximal term
    needs them, sums and corrections of gradients where control variates do, and `frozen` weights."""
    c = config.codec
    sent = max(part.layout.size for part in split.sent.values())
    up, down = _bytes(config, c.uplink, sent), _bytes(config, c.downlink, split.shared.layout.size)
    trained = split.shared.layout.size + split.personal.layout.size
    via = ExtrasChannel(config, split.shared.layout)
    beside = sum(_bytes(config, via.codecs[name], size) for name, size in via.sizes.items())
    up, down = up + beside, down + beside
    averages = {"adamw8bit": 2, "muon": 4, "sgd": 0}.get(config.train.optimizer, 8)
    controlled = 8 if config.train.control != "none" else 0
    memory = trained * (8 + averages + controlled + (4 if config.train.mu else 0)) + 4 * frozen
    return f"up={up / 1e6:.3g}MB down={down / 1e6:.3g}MB memory={memory / 1e9:.3g}GB"


def _bytes(config: RunConfig, name: str, size: int) -> int:
    """Returns about what `size` values take: those of trained weights are near to normal."""
    count = min(size, _PROBE)
    values = np.random.default_rng(0).standard_normal(count, np.float32) * np.float32(0.05)
    if name == SUM:
        nodes = dict.fromkeys(map(str, range(max(LEAST_OF_SUM, nodes_asked(config, config.min_nodes)))), 1)
        return SumGrid(config, size, 1, shares_of(config, nodes)).words * WORD // 8
    frame = channel(name, config.codec, "0" * 32, count).encode(values, config.codec.target, 1, 0)
    return len(frame) * size // count
