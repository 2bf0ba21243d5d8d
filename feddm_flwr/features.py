"""Networks whose features stand for images when sets of them are compared: which one it was is part of every figure.

`classifier` is trained here on the reference images, so it needs their classes, and nothing to be downloaded. It is
for comparing runs on the same images; its figures mean nothing beside others'. `dinov2` comes from a hub or a folder,
`inception`, the field's own, from torch-fidelity.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from feddm_flwr.array_cache import cached, facts, write_facts
from feddm_flwr.config import ConfigError, derive_seed
from feddm_flwr.images import Images

log = logging.getLogger("feddm")

KINDS = ("classifier", "dinov2", "inception")
DINOV2 = "facebook/dinov2-base"
_FORMAT = 1  # of the classifier: raised when it would be trained to another
_EPOCHS, _BATCH, _AT_MOST = 4, 128, 20_000
_HELD_OUT = 0.1
_AT_A_TIME = 256


@dataclass(frozen=True)
class FeatureNetwork:
    """Images in, features out."""

    name: str  # as it stands beside a figure
    resize: str  # how images are made to fit it
    extract: Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> (B, D)

    def __call__(self, images: Images) -> Tensor:
        """Features of uint8 images (N, C, H, W): (N, D), float32, on the CPU."""
        with torch.inference_mode():
            return torch.cat([self.extract(part).float().cpu() for part in torch.from_numpy(images).split(_AT_A_TIME)])


def make(kind: str, images: Images, classes: list[str], root: Path, folder: str = "") -> FeatureNetwork:
    """The network of a kind for the comparison with reference `images`; a classifier is kept in the cache below `root`.
    `folder` is where dinov2 is read from, a hub id or a folder; empty: facebook/dinov2-base.

    Raises:
        ConfigError: it cannot be had.
    """
    if kind == "classifier":
        return _classifier(images, classes, root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _dinov2(folder or DINOV2, device) if kind == "dinov2" else _inception(device)


class _Classifier(nn.Module):
    """A small convolutional network; its features are what its last layer sees."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, wider, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(wide, wider, 3, stride, 1), nn.GroupNorm(8, wider), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)


def _classifier(images: Images, classes: list[str], root: Path) -> FeatureNetwork:
    names = sorted({*classes})
    if len(names) < 2:
        raise ConfigError("--features = 'classifier': needs images of two classes or more; use dinov2 or inception")
    labels = np.array([names.index(name) for name in classes])
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def fill(folder: Path) -> None:
        network, accuracy = _trained(images, labels)
        save_file(network.state_dict(), folder / "classifier.safetensors")
        write_facts(folder, {"accuracy": accuracy})

    folder = cached(root, {"format": _FORMAT, "classifier": digest}, fill)
    network = _Classifier(images.shape[1], len(names))
    network.load_state_dict(load_file(folder / "classifier.safetensors"))
    network.eval()
    accuracy = facts(folder)["accuracy"]
    name = f"classifier (trained on these {len(names)} classes, {accuracy:.1%} right on held-out images)"
    return FeatureNetwork(name, "none", lambda x: network.body(x.float() / 127.5 - 1))


def _trained(images: Images, labels: np.ndarray[Any, Any]) -> tuple[_Classifier, float]:
    """The classifier, and the share of held-out images that it gets right."""
    order = np.random.default_rng(derive_seed("classifier", _FORMAT)).permutation(len(images))[:_AT_MOST]
    held_out, train = np.split(order, [max(1, round(_HELD_OUT * len(order)))])
    log.info("training the classifier whose features are compared, on %d images", len(train))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("classifier", _FORMAT))
        network = _Classifier(images.shape[1], int(labels.max()) + 1)
        steps = _EPOCHS * -(-len(train) // _BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(train)).split(_BATCH):
                chosen = train[batch.numpy()]
                x = torch.from_numpy(images[chosen]).float() / 127.5 - 1
                loss = cross_entropy(network.head(network.body(x)), torch.from_numpy(labels[chosen]))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    network.eval()
    right = 0
    with torch.inference_mode():
        for part in np.array_split(held_out, -(-len(held_out) // _AT_A_TIME)):
            x = torch.from_numpy(images[part]).float() / 127.5 - 1
            right += int((network.head(network.body(x)).argmax(1).numpy() == labels[part]).sum())
    return network, right / len(held_out)


def _dinov2(name: str, device: str) -> FeatureNetwork:
    try:
        from transformers import AutoModel

        network = AutoModel.from_pretrained(name).to(device).eval()
        patch = int(network.config.patch_size)
    except Exception as error:  # the library raises many kinds for many causes
        raise ConfigError(
            f"--features = 'dinov2': {name!r} cannot be read ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}); without network, download it elsewhere "
            f"(hf download {DINOV2} --local-dir FOLDER) and give --features-from FOLDER; pip install transformers"
        ) from error
    side = 224 // patch * patch
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def extract(x: Tensor) -> Tensor:
        z = interpolate(x.to(device).float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        features: Tensor = network(((z.expand(-1, 3, -1, -1)) - mean) / std).last_hidden_state[:, 0]
        return features

    return FeatureNetwork(f"dinov2 ({name}, class token)", f"antialiased bicubic to {side}x{side}", extract)


def _inception(device: str) -> FeatureNetwork:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    except Exception as error:  # not installed, or its weights cannot be downloaded
        raise ConfigError(
            f"--features = 'inception': cannot be had ({type(error).__name__}: {error}); pip install torch-fidelity, "
            "which downloads the weights at the first use, or use classifier or dinov2"
        ) from error

    def extract(x: Tensor) -> Tensor:
        features: Tensor = network(x.to(device).expand(-1, 3, -1, -1))[0]
        return features

    return FeatureNetwork("inception (torch-fidelity, 2048)", "bilinear to 299x299, as TensorFlow 1 did", extract)
