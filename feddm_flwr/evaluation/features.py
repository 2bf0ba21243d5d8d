"""Networks whose features stand for images when sets of them are compared: which one it was is part of every figure.

`classifier` is trained here on the reference images, so it needs their classes, and nothing to be downloaded. It is
for comparing runs on the same images; its figures mean nothing beside others'. So is `random`, an untrained network,
for where nobody holds the reference images. `dinov2` comes from a hub or a folder, `inception`, the field's own, from
torch-fidelity.

A network is a recipe, tensors and facts, that fits into a file: a federation's nodes must use the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from feddm_flwr.compute.device import usual_device
from feddm_flwr.config import ConfigError, derive_seed
from feddm_flwr.data.images import Images
from feddm_flwr.models.pixels import to_network
from feddm_flwr.models.pretrained import config_of, tensors_of
from feddm_flwr.storage.array_cache import cached, write_facts

log = logging.getLogger(__name__)

DINOV2 = "facebook/dinov2-base"
_FORMAT = 2  # of the classifier: raised when it would be trained to another
_EPOCHS, _BATCH, _AT_MOST = 4, 128, 20_000
_HELD_OUT = 0.1
_AT_A_TIME = 256


@dataclass(frozen=True)
class FeatureNetwork:
    """Images in, features out."""

    name: str  # as it stands beside a figure
    resize: str  # how images are made to fit it
    extract: Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> (B, D)
    logits: Callable[[Tensor], Tensor] | None = None  # of its own classes, from features

    def __call__(self, images: Images) -> Tensor:
        """Features of uint8 images (N, C, H, W): (N, D), float32, on the CPU."""
        starts = range(0, len(images), _AT_A_TIME)
        parts = (torch.from_numpy(np.array(images[i : i + _AT_A_TIME])) for i in starts)
        with torch.inference_mode():
            return torch.cat([self.extract(part).float().cpu() for part in parts])


@dataclass(frozen=True)
class Recipe:
    """What a network is made from."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def bytes(self) -> bytes:
        """Returns as a safetensors file with the facts in its metadata."""
        return save({**self.tensors, "": torch.zeros(0)}, {"config": json.dumps(self.facts)})

    def build(self) -> FeatureNetwork:
        """Returns the network.

        Raises:
            ConfigError: what it needs is not installed here, or cannot be downloaded.
        """
        build = {"classifier": _convolutional, "random": _convolutional, "dinov2": _dinov2, "inception": _inception}
        return build[self.facts["kind"]](self, usual_device())


def read(path: Path) -> Recipe:
    """Returns the recipe in a file."""
    return Recipe(config_of(path), {name: tensor for name, tensor in tensors_of(path).items() if name})


def recipe(
    kind: str, channels: int, reference: Callable[[], tuple[Images, list[str]]], root: Path, folder: str = ""
) -> Recipe:
    """Returns the recipe of a kind of network, for images of so many channels. A classifier asks for the `reference`
    images and their classes, and is kept in the cache below `root`. `folder` is where dinov2 is read from, a hub id or
    a folder; empty: facebook/dinov2-base.

    Raises:
        ConfigError: it cannot be had.
    """
    if kind == "classifier":
        return _classifier(*reference(), root)
    if kind == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("random features", _FORMAT))
            tensors = _Convolutional(channels, 1).state_dict()
        name = "random (an untrained network; compares runs on the same images, no more)"
        return Recipe({"kind": kind, "name": name, "channels": channels, "classes": []}, tensors)
    return _read_dinov2(folder or DINOV2) if kind == "dinov2" else Recipe({"kind": kind}, {})


class _Convolutional(nn.Module):
    """A small convolutional network; its features are what its last layer sees."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, wider, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(wide, wider, 3, stride, 1), nn.GroupNorm(8, wider), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)


def _convolutional(made: Recipe, device: torch.device) -> FeatureNetwork:
    facts = made.facts
    network = _Convolutional(facts["channels"], len(facts["classes"]) or 1)
    network.load_state_dict(made.tensors)
    network.eval().to(device)

    @torch.inference_mode()
    def logits(features: Tensor) -> Tensor:
        told: Tensor = network.head(features.to(device)).cpu()
        return told

    def extract(x: Tensor) -> Tensor:
        features: Tensor = network.body(to_network(x.to(device)))
        return features

    return FeatureNetwork(facts["name"], "none", extract, logits if facts["classes"] else None)


def _classifier(images: Images, classes: list[str], root: Path) -> Recipe:
    names = sorted({*classes})
    if len(names) < 2:
        raise ConfigError(
            "eval.features (--features) = 'classifier': needs images of two classes or more; use random, dinov2 or "
            "inception"
        )
    labels = np.array([names.index(name) for name in classes])
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def fill(folder: Path) -> None:
        network, accuracy = _trained(images, labels)
        name = f"classifier (trained on these {len(names)} classes, {accuracy:.1%} right on held-out images)"
        facts = {"kind": "classifier", "name": name, "channels": images.shape[1], "classes": names}
        (folder / "classifier.safetensors").write_bytes(Recipe(facts, network.state_dict()).bytes())
        write_facts(folder, {})

    return read(cached(root, {"format": _FORMAT, "classifier": digest}, "", fill) / "classifier.safetensors")


def _trained(images: Images, labels: np.ndarray[Any, Any]) -> tuple[_Convolutional, float]:
    """Returns the classifier, and the share of held-out images that it gets right."""
    order = np.random.default_rng(derive_seed("classifier", _FORMAT)).permutation(len(images))[:_AT_MOST]
    held_out, train = np.split(order, [max(1, round(_HELD_OUT * len(order)))])
    log.info("training the classifier whose features are compared, on %d images", len(train))
    network = fit(images[train], labels[train], int(labels.max()) + 1, _EPOCHS, derive_seed("classifier", _FORMAT))
    right = 0
    with torch.inference_mode():
        for part in np.array_split(held_out, -(-len(held_out) // _AT_A_TIME)):
            x = to_network(torch.from_numpy(images[part]))
            right += int((network.head(network.body(x)).argmax(1).numpy() == labels[part]).sum())
    return network, right / len(held_out)


def fit(images: Images, labels: NDArray[np.int64], classes: int, epochs: int, seed: int) -> _Convolutional:
    """Returns a small network that was trained to tell so many classes apart, on images (N, C, H, W)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Convolutional(images.shape[1], classes)
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
        steps = epochs * -(-len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(_BATCH):
                chosen = batch.numpy()
                x = to_network(torch.from_numpy(images[chosen]))
                loss = cross_entropy(network.head(network.body(x)), torch.from_numpy(labels[chosen]))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _read_dinov2(name: str) -> Recipe:
    try:
        from transformers import AutoModel

        network = AutoModel.from_pretrained(name)
        config = {**network.config.to_dict(), "patch_size": int(network.config.patch_size)}
    except Exception as error:  # the library raises many kinds for many causes
        raise ConfigError(
            f"features = 'dinov2': {name!r} cannot be read ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}); without network, download it elsewhere "
            f"(hf download {DINOV2} --local-dir FOLDER) and name FOLDER; pip install transformers"
        ) from error
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    return Recipe({"kind": "dinov2", "name": f"dinov2 ({name}, class token)", "config": config}, tensors)


def _dinov2(made: Recipe, device: torch.device) -> FeatureNetwork:
    try:
        from transformers import AutoConfig, AutoModel
    except ModuleNotFoundError as error:
        raise ConfigError("features = 'dinov2': transformers is not installed: pip install transformers") from error
    network = AutoModel.from_config(AutoConfig.for_model(**made.facts["config"]))
    network.load_state_dict(made.tensors)
    network.to(device).eval()
    patch = made.facts["config"]["patch_size"]
    side = 224 // patch * patch
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def extract(x: Tensor) -> Tensor:
        z = interpolate(x.to(device).float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        features: Tensor = network(((z.expand(-1, 3, -1, -1)) - mean) / std).last_hidden_state[:, 0]
        return features

    return FeatureNetwork(made.facts["name"], f"antialiased bicubic to {side}x{side}", extract)


def _inception(_: Recipe, device: torch.device) -> FeatureNetwork:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    except Exception as error:  # not installed, or its weights cannot be downloaded
        raise ConfigError(
            f"features = 'inception': cannot be had ({type(error).__name__}: {error}); pip install torch-fidelity, "
            "which downloads the weights at the first use, or use classifier or dinov2"
        ) from error

    def extract(x: Tensor) -> Tensor:
        features: Tensor = network(x.to(device).expand(-1, 3, -1, -1))[0]
        return features

    return FeatureNetwork("inception (torch-fidelity, 2048)", "bilinear to 299x299, as TensorFlow 1 did", extract)
