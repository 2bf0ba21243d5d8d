"""A node's part in judging a model: sums of its images' features, the final model's loss, and the audit.

Only sums and counts leave the node.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feddm_flwr import architecture, features, model, training
from feddm_flwr.assets import FEATURES, Assets
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.data import NodeData
from feddm_flwr.exchange import exact
from feddm_flwr.node_round import Outcome, Report, assets_of, examples
from feddm_flwr.objectives import Denoising
from feddm_flwr.reference import statistics

log = logging.getLogger("feddm")

REFERENCE, FINAL = "reference", "final"
WEIGHTS, SAMPLES = "weights", "samples"  # frames of the final evaluation

_PER_CLASS = 10  # of a class as many images are needed as of a node, over this
_AT_A_TIME = 4096
_QUANTILE = 0.01  # of unseen images that are as near to a training image by chance
_AUDITED = 2048  # held-out images that are compared, and images whose loss is


def do(config: RunConfig, name: str, data: NodeData, root: Path, said: Report, frames: Mapping[str, bytes]) -> Outcome:
    """Answer the question that the server `said`, with its frames, as node `name`.

    Raises:
        ConfigError: the feature network cannot be had here, or there are too few images for sums of them to be told.
        FrameError: a frame is corrupt.
    """
    device = training.prepare_process(config)
    assets = assets_of(root, str(said["assets"]), frames)
    report: Report = {"name": name, "kind": said["kind"]}
    if assets is None:
        return Outcome(report, b"")
    if said["kind"] == REFERENCE:
        if len(data.train) < config.eval.min_images:  # the server asks none that has few; images may have gone since
            raise ConfigError(f"eval.min-images = {config.eval.min_images}: this node has {len(data.train)}")
        network = features.read(assets[FEATURES]).build()
        log.info("summing the features of %d images", len(data.train) + len(data.held_out))
        seen = torch.cat([network(images) for images in (data.held_out, data.train) if len(images)])
        return Outcome(report, statistics(seen, data.classes, config.eval.min_images // _PER_CLASS).pack())
    report |= _final(config, name, data, assets, root, frames, device)
    return Outcome(report, b"done")


def _final(
    config: RunConfig,
    name: str,
    data: NodeData,
    assets: Assets,
    root: Path,
    frames: Mapping[str, bytes],
    device: torch.device,
) -> Report:
    network = architecture.build(config, assets).to(device)
    layout = model.layout(network)
    channel = exact(layout.fingerprint, layout.size)
    model.load_vector(network, channel.decode(frames[WEIGHTS], "weights", config.num_server_rounds))
    trained, unseen = examples(config, data, assets, root, device)
    held_out = unseen.held_out(network, config.eval.images, name)
    report: Report = {"eval-loss": held_out.loss, "latent-power": held_out.latent_power}
    if config.eval.audit and isinstance(trained, Denoising) and isinstance(unseen, Denoising):
        shape = (-1, config.data.channels, config.data.image_size, config.data.image_size)
        samples = np.frombuffer(frames[SAMPLES], np.uint8).reshape(shape)
        extract = features.read(assets[FEATURES]).build()
        count = min(len(data.train), len(data.held_out), _AUDITED)
        unseen_ones = data.held_out[:_AUDITED]
        near = near_copies(extract(samples), extract(data.train), extract(unseen_ones))
        losses = (each.fixed_losses(network, count, name) for each in (trained, unseen))
        report |= {"near": near, "members-auc": separability(*losses), "unseen": len(unseen_ones)}
    return report


def near_copies(samples: Tensor, trained: Tensor, unseen: Tensor) -> int:
    """How many samples are nearer to a training image, by their features (N, D), than all but one in a hundred real
    images are that the model never saw."""
    chance = _nearest(unseen, trained).quantile(_QUANTILE)
    return int((_nearest(samples, trained) <= chance).sum())


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """The distance of each point to the nearest of the others, exactly 0 for the same."""
    exactly = "donot_use_mm_for_euclid_dist"
    parts = (torch.cdist(points.double(), part.double(), compute_mode=exactly) for part in others.split(_AT_A_TIME))
    return torch.stack([part.min(1).values for part in parts]).min(0).values


def near_by_chance(samples: int, unseen: int) -> float:
    """How many samples `near_copies` finds on average where nothing was copied: the quantile of few images is itself
    near to the least of them."""
    return samples * (_QUANTILE * (unseen - 1) + 1) / (unseen + 1)


def separability(members: Tensor, others: Tensor) -> float:
    """How well the loss tells images that were trained on from others: the area under the curve of the attack that
    takes a low loss for membership (Yeom et al. 2018). 0.5 is chance, 1 certainty. Both losses are of the same noise
    levels, in order, and are compared level by level."""
    below = (members < others).double() + 0.5 * (members == others).double()
    return float(below.mean())
