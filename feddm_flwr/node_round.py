"""A node's part in a round: decode the weights, measure the held-out loss on them, train, encode what came of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from feddm_flwr import architecture, latents, model, objectives, pipelines, training
from feddm_flwr.assets import AUTOENCODER, PERCEPTUAL, Assets, kept, tensors_of
from feddm_flwr.config import RunConfig
from feddm_flwr.data import NodeData
from feddm_flwr.node_link import NodeLink, Task
from feddm_flwr.node_state import StateLostError
from feddm_flwr.parts import parts_of
from feddm_flwr.perceptual import VGG16

log = logging.getLogger("feddm")

_ASSET = "asset-"  # what the names of frames begin with that are assets

#: What the server is told of a round, beside the frame.
Report = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    report: Report
    frame: bytes  # empty where the node had lost what the server's frames add to


def do(config: RunConfig, name: str, data: NodeData, root: Path, said: Report, frames: Mapping[str, bytes]) -> Outcome:
    """Do the task that the server `said`, with its frames, as node `name` whose state is below `root`.

    Raises:
        FrameError: a frame is corrupt.
        FloatingPointError: the training diverged.
    """
    task = Task(**{key.replace("-", "_"): value for key, value in said.items()})  # type: ignore[arg-type]
    device = training.prepare_process(config)
    assets = assets_of(root, task.assets, frames)
    if assets is None:
        log.warning("what the run builds upon is not here; the server sends it")
        return Outcome({"name": name, "round": task.round}, b"")
    frames = {key: frame for key, frame in frames.items() if not key.startswith(_ASSET)}
    network = architecture.build(config, assets)
    parts = parts_of(model.layout(network), config)
    link = NodeLink(config, parts, name, root, task)
    try:
        received = link.receive(frames, model.to_vector(network))
    except StateLostError as error:
        log.warning("%s", error)  # the server sends the whole of it
        return Outcome({"name": name, "round": task.round}, b"")
    model.load_vector(network.to(device), received)

    objective, unseen = examples(config, data, assets, root, device)
    held_out = unseen.held_out(network, config.eval.images if task.evaluate else 0, name)
    progress, start = training.Progress(task.round, task.steps_before), link.start(received)
    trained = training.train(network, objective, config, name, progress, device, start)
    sent = link.send(model.flat(network), received)
    if link.state and parts.personal.layout.names:
        fill = partial(pipelines.save, network, config, assets, card="")
        link.state.replace_folder("pipeline", "personal", task.round, fill)
    report: Report = {
        "name": name,
        "round": task.round,
        "images": len(data.train),
        "steps": trained.steps,
        "train-loss": trained.loss,
        "eval-loss": held_out.loss,
        "eval-levels": json.dumps(held_out.levels),
        "coding-error": sent.error,
        "state-lost": link.state_lost,
    }
    return Outcome(report, sent.frame)


def assets_of(root: Path, wanted: str, frames: Mapping[str, bytes]) -> dict[str, Path] | None:
    """The files of what a task builds upon: JSON of their SHA-256 by kind, and the message's frames, some of which may
    be such files; None where one is missing."""
    sent = {key.removeprefix(_ASSET): frame for key, frame in frames.items() if key.startswith(_ASSET)}
    return kept(root, json.loads(wanted), sent)


def examples(
    config: RunConfig, data: NodeData, assets: Assets, root: Path, device: torch.device
) -> tuple[objectives.Objective, objectives.Objective]:
    """What the node minimizes, and the same of its held-out images."""
    flip = config.data.flip
    if config.stage == "autoencoder":
        looks = VGG16(tensors_of(assets[PERCEPTUAL])).to(device) if PERCEPTUAL in assets else None
        pixels = objectives.Pixels(data.train, flip, device)
        unseen = objectives.Pixels(data.held_out, False, device)
        return objectives.Reconstruction(config, pixels, device, looks), objectives.Reconstruction(
            config, unseen, device
        )
    both: tuple[objectives.Pixels | latents.Latents, ...]
    if AUTOENCODER in assets:
        both = latents.encoded(data, assets[AUTOENCODER], flip, root, device)
    else:
        both = tuple(objectives.Pixels(images, flip, device) for images in (data.train, data.held_out))
    train, held_out = (
        objectives.Denoising(config, some, labels, device)
        for some, labels in zip(both, (data.train_labels, data.held_out_labels), strict=True)
    )
    return train, held_out
