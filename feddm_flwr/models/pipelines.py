"""What comes of a run: a folder that diffusers loads without this package."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.models.autoencoder import load_autoencoder
from feddm_flwr.models.class_pipeline import ClassPipeline
from feddm_flwr.models.diffusion import PREDICTIONS, SCHEDULES
from feddm_flwr.models.lora import merge_adapters
from feddm_flwr.models.pretrained import AUTOENCODER, Assets, variant_in


def noise_scheduler(config: RunConfig) -> Any:
    """Returns the diffusers scheduler of the configured process, as the pipeline folder carries it."""
    d = config.diffusion
    if d.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=d.timesteps)
    return DDPMScheduler(
        num_train_timesteps=d.timesteps,
        beta_schedule=SCHEDULES[d.schedule],
        prediction_type=PREDICTIONS[d.prediction],
        clip_sample=config.model.kind == "ddpm",  # latents have no bounds
        # Few steps that begin where there is only noise: diffusers' default begins below it, at twice the FID (Lin et
        # al. 2024, arXiv 2305.08891; docs/performance.md).
        timestep_spacing="trailing",
    )


def save(
    network: Any, config: RunConfig, assets: Assets, path: Path, card: str, latent_power: float | None = None
) -> None:
    """Writes the network as a `DDPMPipeline`, an `LDMPipeline`, a `ClassPipeline` whose code goes with it, or, where an
    autoencoder was trained, as an `AutoencoderKL` whose latents have the mean square `latent_power`.

    Raises:
        ValueError: an autoencoder's power is not known; a latent model on it would be trained on the wrong scale.
    """
    network = copy.deepcopy(network).float().cpu()
    if config.stage == "autoencoder":
        if not latent_power:
            raise ValueError("no node gave the power of the latents, which the scaling factor is made of")
        network.register_to_config(scaling_factor=1 / math.sqrt(latent_power))
        network.save_pretrained(path)
    else:
        merge_adapters(network)
        _pipeline(network, config, assets).save_pretrained(path)
    (path / "README.md").write_text(card, encoding="utf-8")


def _pipeline(network: Any, config: RunConfig, assets: Assets) -> Any:
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    scheduler = noise_scheduler(config)
    autoencoder = load_autoencoder(assets[AUTOENCODER]) if AUTOENCODER in assets else None
    flow = config.diffusion.prediction == "flow"
    if config.model.class_conditional or (flow and autoencoder is not None):
        names = ",".join(config.taught_classes)
        solver = scheduler if flow else UniPCMultistepScheduler.from_config(scheduler.config)
        return ClassPipeline(unet=network, scheduler=solver, vae=autoencoder, class_names=names, flow=flow)
    if autoencoder is None:
        return DDPMPipeline(unet=network, scheduler=scheduler)
    from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return LDMPipeline(vqvae=autoencoder, unet=network, scheduler=DDIMScheduler.from_config(scheduler.config))


def load(folder: Path) -> Any:
    """Returns the pipeline in a folder, whichever it is. No code in the folder is run: the class is this package's own.

    Raises:
        ConfigError: it is not a pipeline of a U-Net.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    own = index.get("_class_name") == ["pipeline", ClassPipeline.__name__]
    try:
        pipeline = (
            _load_own(folder, index)
            if own
            else DiffusionPipeline.from_pretrained(str(folder), variant=variant_in(folder / "unet"))
        )
        if not hasattr(pipeline, "unet"):
            raise ValueError("it has no unet")
    except Exception as error:  # the library raises many kinds
        raise ConfigError(
            f"MODEL_OR_RUN = {str(folder)!r}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    return pipeline


def _load_own(folder: Path, index: dict[str, Any]) -> ClassPipeline:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d import UNet2DModel

    def part(cls: Any, name: str) -> Any:
        return cls.from_pretrained(folder / name, variant=variant_in(folder / name))

    flow = bool(index.get("flow"))
    scheduler: Any = FlowMatchEulerDiscreteScheduler if flow else UniPCMultistepScheduler
    return ClassPipeline(
        part(UNet2DModel, "unet"),
        scheduler.from_pretrained(folder / "scheduler"),
        part(AutoencoderKL, "vae") if (folder / "vae").is_dir() else None,
        str(index["class_names"]),
        flow,
    )


def class_names(pipeline: Any) -> list[str]:
    """Returns the classes that a pipeline knows, in the order of their labels."""
    return [name.strip() for name in pipeline.config.get("class_names", "").split(",") if name.strip()]


def autoencoder(pipeline: Any) -> Any:
    """Returns a pipeline's autoencoder; None where it works on pixels."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
