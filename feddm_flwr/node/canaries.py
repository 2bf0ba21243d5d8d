"""Images that a node makes up and puts among its own, to see whether the model tells of them (see `privacy.audit`)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from feddm_flwr.config import RunConfig, derive_seed
from feddm_flwr.data.node_data import NodeData


def with_canaries(config: RunConfig, name: str, data: NodeData) -> NodeData:
    """Returns the images of node `name` with its canaries among those to train on, where the run has some."""
    if not config.privacy.canaries:
        return data
    alone, included = candidates(config, name, data)
    return replace(
        data,
        train=np.concatenate([data.train, alone.train[included]]),
        train_labels=np.concatenate([data.train_labels, alone.train_labels[included]]),
        fingerprint=_digest(data, f"with {config.privacy.canaries} canaries"),
        groups=(*data.groups, *[1] * int(included.sum())) if data.groups else (),
    )


def candidates(config: RunConfig, name: str, data: NodeData) -> tuple[NodeData, NDArray[np.bool_]]:
    """Returns all images that the node makes up, of squares that are black or white at random, as a node's whose only
    ones they are, and which of them are put among its own."""
    d, count = config.data, config.privacy.canaries
    random = np.random.default_rng(derive_seed(config.seed, name, "canaries"))
    squares = min(8, d.image_size)
    coarse = random.integers(0, 2, (count, d.channels, squares, squares), dtype=np.uint8) * np.uint8(255)
    place = np.arange(d.image_size) * squares // d.image_size
    images = coarse[:, :, place][:, :, :, place]
    labels = np.arange(count, dtype=np.int64) % max(1, len(d.class_names))
    alone = replace(
        data,
        train=images,
        train_labels=labels,
        held_out=images[:0],
        held_out_labels=labels[:0],
        groups=(),
        fingerprint=_digest(data, f"{count} candidates"),
    )
    return alone, random.random(count) < 0.5


def _digest(data: NodeData, what: str) -> str:
    return hashlib.sha1(f"{data.fingerprint} {what}".encode()).hexdigest() if data.fingerprint else ""
