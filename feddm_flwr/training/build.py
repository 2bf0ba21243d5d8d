"""Which objective a run's node minimizes, on which of its examples."""

from __future__ import annotations

from pathlib import Path

import torch

from feddm_flwr.config import RunConfig
from feddm_flwr.config.plugins import is_plugin, load_class
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.models.pretrained import AUTOENCODER, PERCEPTUAL, Assets, tensors_of
from feddm_flwr.models.vgg16 import VGG16
from feddm_flwr.training.examples import Examples, Pixels
from feddm_flwr.training.latents import encoded
from feddm_flwr.training.objectives import Denoising, Objective
from feddm_flwr.training.reconstruction import Reconstruction

#: The objective on a node's training images, and the same on its held-out images.
Pair = tuple[Objective, Objective]


def build_objectives(config: RunConfig, data: NodeData, assets: Assets, root: Path, device: torch.device) -> Pair:
    """Returns what the node minimizes, and the same of its held-out images.

    `root` is the node's state folder, where latents are cached.

    Raises:
        OSError: the cache of latents cannot be written.
    """
    return {"diffusion": _denoising, "autoencoder": _reconstruction}[config.stage](config, data, assets, root, device)


def _reconstruction(config: RunConfig, data: NodeData, assets: Assets, root: Path, device: torch.device) -> Pair:
    looks = VGG16(tensors_of(assets[PERCEPTUAL])).to(device) if PERCEPTUAL in assets else None
    train, held_out = _pixels(config, data, device)
    return Reconstruction(config, train, device, looks), Reconstruction(config, held_out, device)


def _denoising(config: RunConfig, data: NodeData, assets: Assets, root: Path, device: torch.device) -> Pair:
    train: Examples
    held_out: Examples
    if AUTOENCODER in assets:
        train, held_out = encoded(data, assets[AUTOENCODER], config.data.flip, root, device)
    else:
        train, held_out = _pixels(config, data, device)
    kind = objective_class(config.train.objective)
    return kind(config, train, data.train_labels, device), kind(config, held_out, data.held_out_labels, device)


def objective_class(name: str) -> type[Denoising]:
    """Returns the class of `train.objective`.

    Raises:
        ConfigError: an extension's is no subclass of `Denoising`.
    """
    return load_class("train.objective", name, Denoising) if is_plugin(name) else Denoising


def _pixels(config: RunConfig, data: NodeData, device: torch.device) -> tuple[Pixels, Pixels]:
    """Returns the training images, flipped at random where asked for, and the held-out ones as they are."""
    return Pixels(data.train, config.data.flip, device), Pixels(data.held_out, False, device)
