"""A node's part in evaluating a model: sums of its images' features, the final model's loss, and the audit.

Only sums and counts leave the node.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from feddm_flwr.compute.device import prepare_process
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.evaluation import features, utility
from feddm_flwr.evaluation.memorization import near_copies, separability
from feddm_flwr.evaluation.statistics import statistics
from feddm_flwr.exchange.channel import exact
from feddm_flwr.models import networks, parameters
from feddm_flwr.models.pretrained import FEATURES, UTILITY, Assets
from feddm_flwr.node.assets import assets_of
from feddm_flwr.node.canaries import candidates
from feddm_flwr.node.outcome import Outcome
from feddm_flwr.privacy.audit import guesses
from feddm_flwr.protocol.replies import Audit, CanaryGuesses, FinalReply, Utility
from feddm_flwr.protocol.tasks import FINAL, FRAME, REFERENCE, SAMPLES, WEIGHTS, Frames, Scalar
from feddm_flwr.training.build import build_objectives
from feddm_flwr.training.objectives import Denoising

log = logging.getLogger(__name__)

_PER_CLASS = 10  # of a class as many images are needed as of a node, over this
_AUDITED = 2048  # held-out images that are compared, and images whose loss is


def do(config: RunConfig, name: str, data: NodeData, root: Path, said: Mapping[str, Scalar], frames: Frames) -> Outcome:
    """Answers the question that the server `said`, with its frames, as node `name`.

    Raises:
        ConfigError: the feature network cannot be had here, or there are too few images for sums of them to be told,
            or the run's configuration does not ask for that.
        FrameError: a frame is corrupt.
    """
    if not _is_asked_for(config, str(said["kind"]), frames):
        raise ConfigError(f"{said['kind']!r} was asked for, which this run's configuration does not: eval.*, privacy.*")
    device = prepare_process(config.train)
    assets = assets_of(root, str(said["assets"]), frames)
    report: dict[str, Scalar] = {"name": name, "kind": said["kind"]}
    if assets is None:
        return Outcome(report, {})
    if said["kind"] == REFERENCE:
        if len(data.train) < config.eval.min_images:  # the server asks none that has few; images may have gone since
            raise ConfigError(f"eval.min-images = {config.eval.min_images}: this node has {len(data.train)}")
        network = features.read(assets[FEATURES]).build()
        log.info("summing the features of %d images", len(data.train) + len(data.held_out))
        seen = torch.cat([network(images) for images in (data.held_out, data.train) if len(images)])
        sums = statistics(seen, data.classes, config.eval.min_images // _PER_CLASS)
        return Outcome(report, {FRAME: sums.pack()})
    final = _final(config, name, data, assets, root, frames, device)
    return Outcome(report | final.to_record(), {FRAME: b"done"})


def _is_asked_for(config: RunConfig, kind: str, frames: Frames) -> bool:
    """Tells whether a run with this configuration has a reason for the question, whatever the server says."""
    e, p = config.eval, config.privacy
    if p.hides_figures:
        return kind == FINAL and p.canaries > 0 and SAMPLES not in frames
    if kind == REFERENCE:
        return e.features != "none"
    reasons = config.stage == "autoencoder" or e.average_by == "loss" or e.audit or e.utility or p.canaries > 0
    return kind == FINAL and reasons and (e.audit or e.utility or SAMPLES not in frames)


def _final(
    config: RunConfig,
    name: str,
    data: NodeData,
    assets: Assets,
    root: Path,
    frames: Frames,
    device: torch.device,
) -> FinalReply:
    network = networks.build(config, assets).to(device)
    layout = parameters.layout(network)
    channel = exact(layout.fingerprint, layout.size)
    parameters.load_vector(network, channel.decode(frames[WEIGHTS], "weights", config.num_server_rounds))
    found = None
    if config.privacy.canaries:  # whatever is found in a model that is public tells of no image
        alone, included = candidates(config, name, data)
        objective, _ = build_objectives(config, alone, assets, root, device)
        assert isinstance(objective, Denoising)
        found = CanaryGuesses(*guesses(objective.mean_losses(network, name).cpu().numpy(), included))
    if config.privacy.hides_figures:
        return FinalReply(None, None, None, found)
    trained, unseen = build_objectives(config, data, assets, root, device)
    held_out = unseen.held_out(network, config.eval.images, name)
    audit, near = None, (0, 0)
    if SAMPLES in frames and isinstance(trained, Denoising) and isinstance(unseen, Denoising):
        shape = (-1, config.data.channels, config.data.image_size, config.data.image_size)
        extract = features.read(assets[FEATURES]).build()
        samples = extract(np.frombuffer(frames[SAMPLES], np.uint8).reshape(shape))
        unseen_ones = extract(data.held_out[:_AUDITED])
        some = unseen_ones[: utility.LOOKED_AT]
        near = len(some), utility.covered(some, samples)
        if config.eval.audit:
            copies = near_copies(samples, extract(data.train), unseen_ones)
            count = min(len(data.train), len(data.held_out), _AUDITED)
            losses = (each.fixed_losses(network, count, name) for each in (trained, unseen))
            audit = Audit(copies, separability(*losses), len(unseen_ones))
    use = _utility(config, data, assets[UTILITY], near) if UTILITY in assets and len(data.held_out) else None
    return FinalReply(held_out.loss, held_out.latent_power, audit, found, use)


def _utility(config: RunConfig, data: NodeData, by_samples: Path, near: tuple[int, int]) -> Utility:
    """Returns what the server's classifier is worth here, and one of the node's own images."""
    own = utility.classifier(data.train, data.train_labels, config.taught_classes)
    told, known = (utility.right(c, data.held_out, data.held_out_labels) for c in (features.read(by_samples), own))
    return Utility(len(data.held_out), told, known, *near)
