"""Weights that a run builds upon and does not change: the autoencoder of a latent model, a U-Net to fine-tune, the
network of a perceptual loss.

The server reads them, from a diffusers folder or a hub, and keeps them in the run's folder; each node is sent them
once and keeps them beside what it caches. A file of them is safetensors with the model's configuration in its
metadata; its name on a node is its SHA-256.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save

from feddm_flwr.config import ConfigError, RunConfig, local_path
from feddm_flwr.models.diffusion import PREDICTIONS, SCHEDULES, is_flow
from feddm_flwr.models.vgg16 import VGG16
from feddm_flwr.storage.atomic import whole_file

log = logging.getLogger(__name__)

#: By kind, their files.
Assets = Mapping[str, Path]

AUTOENCODER, UNET, PERCEPTUAL, FEATURES, UTILITY = "autoencoder", "unet", "perceptual", "features", "utility"
#: Every kind of them.
KINDS = (AUTOENCODER, UNET, PERCEPTUAL, FEATURES, UTILITY)
#: By kind: the class, and where a pipeline's folder has it.
_CLASSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    AUTOENCODER: (AutoencoderKL, ("", "vae", "vqvae")),
    UNET: (UNet2DModel, ("", "unet")),
}


def fetch(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Returns the files of what the run builds upon, made in `folder` where they are not there yet.

    Raises:
        ConfigError: a model cannot be had, or is of another kind.
    """
    wanted = {
        AUTOENCODER: ("model.autoencoder", config.model.autoencoder),
        UNET: ("model.init-from", config.model.init_from),
        PERCEPTUAL: ("autoencoder.perceptual", config.autoencoder.perceptual),
    }
    files = {}
    for kind, (key, name) in wanted.items():
        if name:
            files[kind] = folder / f"{kind}.safetensors"
            if not files[kind].is_file():  # where a run is resumed, the hub may have another by now
                folder.mkdir(parents=True, exist_ok=True)
                if kind == UNET:
                    _check_process(config)
                _write(_read_vgg(key, name) if kind == PERCEPTUAL else _read(kind, key, name), files[kind])
    return files


def _read(kind: str, key: str, name: str) -> torch.nn.Module:
    cls, subfolders = _CLASSES[kind]
    here = _here(name)
    problem: Exception | None = None
    for subfolder in subfolders:
        if here and not (here / subfolder / "config.json").is_file():
            continue
        try:
            own = cls.load_config(str(here or name), subfolder=subfolder or None).get("_class_name", cls.__name__)
        except Exception as error:  # the library raises many kinds for many causes
            problem = problem or error
            continue
        if own != cls.__name__:
            raise ConfigError(f"{key} = {name!r}: is {_a(own)}; must be {_a(cls.__name__)}")
        for variant in [variant_in(here / subfolder)] if here else [None, "fp16"]:
            try:
                model, found = cls.from_pretrained(
                    str(here or name), subfolder=subfolder or None, variant=variant, output_loading_info=True
                )
                if lacks := found["missing_keys"]:
                    raise ValueError(f"it lacks {len(lacks)} of its weights, {sorted(lacks)[0]} among them")
                if any(not torch.isfinite(p).all() for p in model.parameters()):
                    raise ValueError("it has weights that are not finite")
                return cast("torch.nn.Module", model)
            except Exception as error:
                problem = problem or error
    text = (
        f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}" if problem else "no config.json there"
    )
    raise ConfigError(
        f"{key} = {name!r}: cannot be read ({text}); must be a diffusers folder, or the id of a {cls.__name__} on a "
        "hub in reach: without network, download it elsewhere (hf download ID --local-dir FOLDER) and name the folder"
    )


def _here(name: str) -> Path | None:
    """Returns the folder on this machine that a model's name means; of a run, its model."""
    path = local_path(name)
    return path / "model" if path and (path / "config.toml").is_file() else path


def _a(name: str) -> str:
    return f"an {name}" if name.startswith("Auto") else f"a {name}"


def variant_in(folder: Path) -> str | None:
    """Returns the variant of the weights in a diffusers model's folder, such as "fp16"; None where there are usual
    ones."""
    matches = [
        re.match(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(safetensors|bin)$", f.name)
        for f in folder.iterdir()
    ]
    found = {m[1] for m in matches if m}
    return None if None in found else min(found, default=None)


def _check_process(config: RunConfig) -> None:
    """Tells whether the U-Net to fine-tune was trained for the noise of this run, where a scheduler beside it tells."""
    name = config.model.init_from
    here = _here(name)
    places = (here / "scheduler", here.parent / "scheduler", here, here.parent) if here else ("scheduler", None)
    own: dict[str, Any] = {}
    for place in places:
        with suppress(OSError):
            own = DDPMScheduler.load_config(place) if here else DDPMScheduler.load_config(name, subfolder=place)
            break
    if not own:
        log.warning("model.init-from = %r: has no scheduler; diffusion.* must be what it was trained with", name)
        return
    d = config.diffusion
    if (flow := is_flow(own)) or d.prediction == "flow":
        if flow and d.prediction == "flow" and own["num_train_timesteps"] == d.timesteps:
            return
        theirs = f"flow with diffusion.timesteps = {own['num_train_timesteps']}" if flow else "another process"
        raise ConfigError(
            f"diffusion.prediction = {d.prediction!r} with diffusion.timesteps = {d.timesteps}: "
            f"model.init-from = {name!r} was trained with {theirs}; must be the same"
        )
    own = {**DDPMScheduler().config, **own}  # an old repository does not say everything
    wrong = [
        f"{key} = {ours!r}: model.init-from = {name!r} was trained with {known.get(theirs, theirs)!r}; must be the same"
        for key, ours, known, theirs in (
            ("diffusion.timesteps", d.timesteps, {}, own["num_train_timesteps"]),
            ("diffusion.schedule", d.schedule, {v: k for k, v in SCHEDULES.items()}, own["beta_schedule"]),
            ("diffusion.prediction", d.prediction, {v: k for k, v in PREDICTIONS.items()}, own["prediction_type"]),
        )
        if known.get(theirs, theirs) != ours
    ]
    betas = own["beta_start"], own["beta_end"]
    if d.schedule == "linear" and betas != (1e-4, 0.02):
        wrong.append(
            f"model.init-from = {name!r}: was trained with betas from {betas[0]} to {betas[1]}, not 1e-4 to 0.02"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))


def _read_vgg(key: str, name: str) -> VGG16:
    here = local_path(name)
    try:
        if here:
            file = here / "model.safetensors" if here.is_dir() else here
        else:
            file = Path(hf_hub_download(name, "model.safetensors"))
        return VGG16(tensors_of(file))
    except Exception as error:  # the libraries raise many kinds for many causes
        raise ConfigError(
            f"{key} = {name!r}: cannot be read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); "
            "must be a safetensors file of VGG16 by torchvision's names, a folder with one as model.safetensors, or "
            "the id of such a model on a hub in reach"
        ) from error


def _write(model: Any, path: Path) -> None:
    own = getattr(model, "config", {})
    config = {k: v for k, v in own.items() if not k.startswith("_") or k == "_class_name"}
    tensors = {k: v.contiguous().float() for k, v in model.state_dict().items()}
    with whole_file(path) as file:
        file.write(save(tensors, {"config": json.dumps(config)}))


def config_of(path: Path) -> dict[str, Any]:
    """Returns the diffusers configuration of a model in a file."""
    with safe_open(path, "pt") as file:
        read: dict[str, Any] = json.loads(file.metadata()["config"])
    return read


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors in a file, float32."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
