"""Drawing from a finished model, this package's or any other diffusers pipeline of a U-Net, and judging it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from feddm_flwr.compute.device import usual_device
from feddm_flwr.config import ConfigError
from feddm_flwr.config.data import Data
from feddm_flwr.data import node_data
from feddm_flwr.data.images import Images
from feddm_flwr.evaluation import features, grids, memorization, sampling, scores
from feddm_flwr.models import pipelines
from feddm_flwr.storage.state_folder import state_root

_LEAST = 10  # real images
_SHOWN = 10  # pairs of a sample and an image


@dataclass(frozen=True)
class How:
    """How samples are drawn."""

    scheduler: str  # empty: the usual one of the model
    steps: int
    guidance: float | None  # of classes; None: 2 where the model knows some
    seed: int


def find(path: Path) -> Path:
    """Returns the pipeline folder that is meant: a run's, or the path itself.

    Raises:
        ConfigError: there is none.
    """
    folder = path / "model" if (path / "model").is_dir() else path
    if (folder / "config.json").is_file() and AutoencoderKL.load_config(folder)["_class_name"] == "AutoencoderKL":
        raise ConfigError(
            f"MODEL_OR_RUN = {str(path)!r}: is an AutoencoderKL, which draws nothing by itself; name a model trained "
            f"on it (model.autoencoder = {str(folder)!r})"
        )
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"MODEL_OR_RUN = {str(path)!r}: no run with a model/ and no pipeline folder (model_index.json)"
        )
    return folder


def draw(
    folder: Path, how: How, count: int, of_class: str | None = None, like: Mapping[str, int] | None = None
) -> Images:
    """Returns samples of the pipeline in a folder, uint8 (count, C, H, W): of one class, of all in proportion to the
    counts that they are to be `like`, or of as many each.

    Raises:
        ConfigError: the folder has no such pipeline, or it cannot do what is asked.
    """
    disable_progress_bar()
    pipeline = pipelines.load(folder)
    limit = pipeline.scheduler.config.num_train_timesteps
    if how.steps > limit:
        raise ConfigError(f"--steps = {how.steps}: must be at most {limit}, the model's noise levels")
    how = _decided(how, folder)
    names = pipelines.class_names(pipeline)
    if not names and how.guidance not in (None, 1.0):
        raise ConfigError(f"--guidance = {how.guidance:g}: the model knows no classes")
    pipeline.to(usual_device())
    return sampling.sample(
        pipeline.unet,
        pipeline.scheduler.config,
        count,
        how.steps,
        how.seed,
        labels=_labels(of_class, count, names, like),
        guidance=2.0 if how.guidance is None else how.guidance,
        autoencoder=pipelines.autoencoder(pipeline),
        scheduler=how.scheduler,
    )


def evaluate(
    folder: Path, data: Data, how: How, count: int, kind: str, kind_from: str = "", *, copies: bool = False
) -> tuple[dict[str, Any], Image.Image | None]:
    """Returns the figures of that many samples against these images, with all that they depend on. With `copies`, the
    images are made to fit the model, and a sheet of the samples that are nearest to one comes with them.

    Raises:
        ConfigError: images, model or feature network cannot be had, or do not fit each other.
    """
    if copies:
        shape = draw(folder, replace(how, steps=1), 1).shape
        data = replace(data, channels=shape[1], image_size=shape[2])
    real, classes, _ = node_data.load_all(data)
    if len(real) < _LEAST:
        raise ConfigError(f"data.name = {data.name!r}: {len(real)} images; at least {_LEAST} can be compared with")
    kind = kind or ("random" if copies and len({*classes}) < 2 else "classifier")
    network = features.recipe(kind, data.channels, lambda: (real, classes), state_root(None), kind_from).build()
    fake = draw(folder, how, count, like=Counter(classes))
    if fake.shape[1:] != real.shape[1:]:
        raise ConfigError(
            f"data.name = {data.name!r}: its images are {real.shape[1:]}, the model's {fake.shape[1:]} "
            "(channels, height, width): name the images with data.name, or set data.image-size and data.channels"
        )
    seen, drawn, near, sheet = network(real), network(fake), dict[str, Any](), None
    if copies:
        found = memorization.nearest_images(drawn, seen)
        near = {"copies": found.copies, "copies_by_chance": found.by_chance}
        order = found.distances.argsort()[:_SHOWN]
        pairs = np.concatenate([fake[order.numpy()], real[found.places[order].numpy()]])
        sheet = grids.grid(pairs, columns=len(order))
    figures = {
        **scores.compare(seen, drawn, how.seed, classes, network.logits, memorization=kind == "inception"),
        **near,
        "features": network.name,
        "resize": network.resize,
        "samples": len(fake),
        **asdict(_decided(how, folder)),
        "weights": "averaged" if (folder.parent / "config.toml").is_file() else "the folder's",
        "real": len(real),
        "data": data.name,
        "split": data.split,
    }
    return figures, sheet


def _decided(how: How, folder: Path) -> How:
    """Returns how samples are drawn of the pipeline in a folder.

    Raises:
        ConfigError: not like that.
    """
    process = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    allowed = sampling.schedulers_for(process)
    if (scheduler := how.scheduler or allowed[0]) not in allowed:
        raise ConfigError(f"--scheduler = {scheduler!r}: must be {' or '.join(allowed)}, by the model's noise process")
    return replace(how, scheduler=scheduler)


def _labels(asked: str | None, count: int, names: list[str], like: Mapping[str, int] | None) -> list[int] | None:
    """Returns the label of each image; None for a model without classes."""
    if not names:
        if asked is not None:
            raise ConfigError(f"--class = {asked!r}: the model knows no classes")
        return None
    if like and any(like.get(name) for name in names):
        return grids.labels_like(like, names, count)
    if asked is None:
        return grids.every_class(len(names), count)
    if asked not in names and not (asked.isdecimal() and int(asked) < len(names)):
        raise ConfigError(f"--class = {asked!r}: must be one of {', '.join(names)}, or a number below {len(names)}")
    return [names.index(asked) if asked in names else int(asked)] * count
