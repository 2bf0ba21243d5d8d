"""What the server finds out about the global model: FID, KID and coverage against images that it never sees, and how
steep its denoiser is."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid

from feddm_flwr.config import ConfigError, RunConfig, flatten
from feddm_flwr.data.images import Images
from feddm_flwr.data.node_data import load_all
from feddm_flwr.evaluation import features, grids, lipschitz, statistics
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.evaluation.statistics import Statistics
from feddm_flwr.models import diffusion
from feddm_flwr.models.pretrained import FEATURES
from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.tasks import REFERENCE
from feddm_flwr.server.federation.transport import frame_of
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage.atomic import UNFINISHED, whole_file
from feddm_flwr.storage.state_folder import state_root
from feddm_flwr.vector import Vector

log = logging.getLogger(__name__)

_LEVELS = (0.05, 0.25, 0.5, 0.9)  # of the time steps, where the denoiser's steepness is looked at
_LOOKED_AT = 2  # samples at each
_TO_CHOOSE_BY = 500  # samples, at most: FIDs of as many, from the same noise, tell which of two models is better
#: What the figures of a run's rounds must have in common.
_SAME = ("eval.features", "eval.features-from", "eval.min-images", "eval.samples", "sample.scheduler", "sample.steps")


def check_reference(config: RunConfig, run: Path) -> None:
    """Compares the configuration of a run that is resumed with what its figures were made by.

    Raises:
        ConfigError: later figures could not be set beside the earlier ones.
    """
    facts = run / "reference" / "facts.json"
    if config.eval.features == "none" or not facts.exists():
        return
    now = flatten(config)
    for key, was in json.loads(facts.read_text(encoding="utf-8"))["keys"].items():
        if (value := now[key]) != was:
            raise ConfigError(f"{key} = {value!r}: was {was!r} in the run to resume, and must stay so")


class GlobalEvaluation:
    """Evaluates a run's models; what it takes for that lies in the run's folder."""

    def __init__(self, model: GlobalModel, run: Path) -> None:
        """Reads or makes the feature network.

        Raises:
            ConfigError: it cannot be had.
        """
        self._model, self._folder, config = model, run / "reference", model.config
        self._folder.mkdir(exist_ok=True)
        self.recipe = self._folder / "features.safetensors"
        if not (self.recipe.exists() and (self._folder / "sums").exists()):  # until then the network may be another
            made = features.recipe(
                config.eval.features,
                config.data.channels,
                lambda: _readable(config),
                state_root(None),
                config.eval.features_from,
            )
            with whole_file(self.recipe) as file:
                file.write(made.bytes())
        self._network = features.read(self.recipe).build()
        self._real: Statistics | None = None
        self._counts: dict[str, int] = {}  # of the real images, by class

    def refer(self, feddm: FedDM, grid: Grid) -> None:
        """Has the nodes sum the features of their images, once for a run: the reference."""
        kept, facts = self._folder / "sums", self._folder / "facts.json"
        config, size = self._model.config, self._size()
        if not kept.exists():
            real, left_out = _gather(feddm, grid, self.recipe, size, config.eval.min_images)
            counts = Counter[str]()
            for node in feddm.nodes:
                counts.update({} if node.name in left_out else node.class_counts)
            about = {
                "classes": {name: counts[name] for name in sorted(real.classes)},
                "features": self._network.name,
                "images": real.count,
                "without": left_out,
                "keys": {key: value for key, value in flatten(config).items() if key in _SAME},
            }
            with whole_file(facts) as file:
                file.write(json.dumps(about, indent=1).encode())
            with whole_file(kept) as file:
                file.write(real.pack())
        said = json.loads(facts.read_text(encoding="utf-8"))
        self._counts = said["classes"]
        self._real = statistics.unpack(kept.read_bytes(), size, [*self._counts])
        without = f" without {', '.join(said['without'])}" if said["without"] else ""
        log.info("reference=%d images%s features=%s", self._real.count, without, self._network.name)

    def fid(self, weights: Vector) -> float:
        """Returns the FID of fewer samples, by which models of a run are told apart."""
        assert self._real
        images, _ = self._drawn(weights, min(self._model.config.eval.samples, _TO_CHOOSE_BY))
        return statistics.fid(self._real, statistics.statistics(self._network(images)))

    def figures(self, weights: Vector) -> dict[str, Any]:
        """Returns FID, KID, coverage by class and the steepness of the model with these weights."""
        assert self._real
        images, labels = self._drawn(weights, self._model.config.eval.samples)
        seen = self._network(images)
        fake = statistics.statistics(seen)
        by_class = statistics.coverage(self._real, self._counts, seen)
        found: dict[str, Any] = {"fid": statistics.fid(self._real, fake), "kid": statistics.kid(self._real, fake)}
        if by_class:
            found |= {"coverage": statistics.covered(by_class, self._counts), "coverage_by_class": by_class}
        found["lipschitz"] = self._steepness(weights, images, labels)
        kid = "" if found["kid"] is None else f" kid={found['kid']:.5f}"
        log.info("fid=%.4f%s samples=%d", found["fid"], kid, len(images))
        return found

    def _drawn(self, weights: Vector, count: int) -> tuple[Images, list[int] | None]:
        """Returns samples, of a model with classes as many of each as the images have, and their labels."""
        names = self._model.config.taught_classes
        labels = grids.labels_like(self._counts, names, count) if names else None
        return self._model.draw(weights, count, 1.0, labels), labels

    def _steepness(self, weights: Vector, images: Images, labels: list[int] | None) -> float:
        config = self._model.config
        every = max(1, len(images) // (_LOOKED_AT * len(_LEVELS)))
        some = images[::every][: _LOOKED_AT * len(_LEVELS)]
        network, x0 = self._model.at(weights), self._model.inputs(some)
        process = diffusion.process(config.diffusion, x0.device)
        steps = [int(level * config.diffusion.timesteps) for level in _LEVELS for _ in range(_LOOKED_AT)]
        t = torch.tensor(steps, device=x0.device) + process.first
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed)).to(x0.device)
        own = None if labels is None else torch.tensor(labels[::every][: len(x0)], device=x0.device)
        return lipschitz.lipschitz(network, process.at(x0, noise, t), t, own)

    def _size(self) -> int:
        c = self._model.config.data
        return self._network(np.zeros((1, c.channels, c.image_size, c.image_size), np.uint8)).shape[1]


def _readable(config: RunConfig) -> tuple[Images, list[str]]:
    """Returns the images of `data.name`, for a classifier."""
    try:
        images, classes, _ = load_all(config.data)
    except ConfigError as error:
        raise ConfigError(
            f"eval.features = 'classifier': the server has no images to train it on ({error}); use random or dinov2"
        ) from error
    return images, classes


def _gather(feddm: FedDM, grid: Grid, recipe: Path, size: int, least: int) -> tuple[Statistics, list[str]]:
    """Returns the sums of all nodes that can be had, added in order of name, and the nodes that are not among them."""
    names: list[str] = []
    # So that memory does not grow with the nodes, not even where /tmp is memory.
    with tempfile.TemporaryDirectory(dir=recipe.parent, prefix=UNFINISHED) as spooled:
        for node, reply in feddm.ask(grid, REFERENCE, {}, {FEATURES: recipe.read_bytes()}, least):
            failure: object = reply
            if isinstance(reply, RecordDict):
                try:
                    sums = bytes(frame_of(reply))
                    found = statistics.unpack(sums, size, sorted(node.class_counts))
                    if found.count != node.images + node.held_out:
                        raise ValueError(f"sums over {found.count} images")
                    if any(n not in (0, node.class_counts[name]) for name, (n, _) in found.classes.items()):
                        raise ValueError("sums over other classes than it has")
                    Path(spooled, str(len(names))).write_bytes(sums)
                    names.append(node.name)
                    continue
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    failure = Failure("malformed", clean(repr(error)))
            log.warning("node=%s: no sums of features: %s", node.name, failure)
        if not names:
            raise RuntimeError(f"eval.features: no node gave sums of features (eval.min-images = {least})")
        known = {node.name: node for node in feddm.nodes}
        places = sorted(range(len(names)), key=lambda place: names[place])
        parts = (
            statistics.unpack(Path(spooled, str(i)).read_bytes(), size, sorted(known[names[i]].class_counts))
            for i in places
        )
        return statistics.total(parts), sorted({*known} - {*names})
