"""The network that a run trains: a U-Net on pixels or latents, from scratch or fine-tuned, or an autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel

from feddm_flwr.config import ConfigError, RunConfig, derive_seed
from feddm_flwr.models.lora import add_adapters
from feddm_flwr.models.pretrained import AUTOENCODER, UNET, Assets, config_of, tensors_of

if TYPE_CHECKING:
    from torch import nn


def build(config: RunConfig, assets: Assets) -> nn.Module:
    """Returns the network with initial weights that depend on the seed and the assets only. What is not trained has
    `requires_grad` false.

    Raises:
        ConfigError: the assets do not fit the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        network: Any = _autoencoder(config) if config.stage == "autoencoder" else _unet(config, assets)
        if config.model.lora_rank:
            add_adapters(network, config)
    if config.train.checkpointing:
        network.enable_gradient_checkpointing()
    built: nn.Module = network
    return built


def _autoencoder(config: RunConfig) -> AutoencoderKL:
    a, n = config.autoencoder, len(config.autoencoder.block_channels)
    return AutoencoderKL(
        in_channels=config.data.channels,
        out_channels=config.data.channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=a.block_channels,
        layers_per_block=a.layers_per_block,
        latent_channels=a.latent_channels,
        norm_num_groups=a.norm_groups,
        sample_size=config.data.image_size,
        scaling_factor=1.0,  # known once it is trained
    )


def _unet(config: RunConfig, assets: Assets) -> UNet2DModel:
    channels, size = _inside(config, assets)
    classes = {"num_class_embeds": len(config.data.class_names) + 1} if config.model.class_conditional else {}
    if UNET in assets:
        own = config_of(assets[UNET])
        if (own["in_channels"], own["out_channels"]) != (channels, channels):
            raise ConfigError(
                f"model.init-from = {config.model.init_from!r}: it has {own['in_channels']} channels, "
                f"here {channels} are needed"
            )
        known = own.get("num_class_embeds")
        if known != (wanted := classes.get("num_class_embeds")) and (known or config.model.lora_rank):
            raise ConfigError(
                f"model.init-from = {config.model.init_from!r}: it knows {max(0, (known or 0) - 1)} classes, "
                f"this run {max(0, (wanted or 0) - 1)}; set model.class-conditional and data.classes to fit"
                + (", or model.lora-rank = 0" if config.model.lora_rank else "")
            )
        _check_stride(size, own["block_out_channels"], f"model.init-from = {config.model.init_from!r}")
        network: UNet2DModel = UNet2DModel.from_config(own | classes, sample_size=size)
        left = network.load_state_dict(tensors_of(assets[UNET]), strict=False)
        if left.unexpected_keys or any(not name.startswith("class_embedding") for name in left.missing_keys):
            raise ConfigError(f"model.init-from = {config.model.init_from!r}: its file lacks some of its weights")
        return network
    m = config.model
    _check_stride(size, m.block_channels, f"model.block-channels = {','.join(map(str, m.block_channels))!r}")
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=m.block_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in m.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(m.attention)),
        layers_per_block=m.layers_per_block,
        attention_head_dim=m.attention_head_dim or None,
        norm_num_groups=m.norm_groups,
        dropout=m.dropout,
        resnet_time_scale_shift="scale_shift" if m.time_scale_shift else "default",
        downsample_type=(resampling := "resnet" if m.resnet_resampling else "conv"),
        upsample_type=resampling,
        **classes,
    )


def _inside(config: RunConfig, assets: Assets) -> tuple[int, int]:
    """Channels and height of what the U-Net works on."""
    if AUTOENCODER not in assets:
        return config.data.channels, config.data.image_size
    own = config_of(assets[AUTOENCODER])
    if own["in_channels"] != config.data.channels:
        raise ConfigError(
            f"model.autoencoder = {config.model.autoencoder!r}: it is for images of {own['in_channels']} channels, "
            f"data.channels = {config.data.channels}"
        )
    if own.get("shift_factor") and not config.model.class_conditional:
        raise ConfigError(
            f"model.autoencoder = {config.model.autoencoder!r}: its latents are shifted (shift_factor), "
            "which diffusers' LDMPipeline does not undo; use another, or model.class-conditional = true"
        )
    _check_stride(
        config.data.image_size, own["block_out_channels"], f"model.autoencoder = {config.model.autoencoder!r}"
    )
    return own["latent_channels"], config.data.image_size // 2 ** (len(own["block_out_channels"]) - 1)


def _check_stride(size: int, channels: Any, what: str) -> None:
    stride = 2 ** (len(channels) - 1)
    if size % stride:
        raise ConfigError(
            f"{what}: {size} pixels (of an image, or of its latents) are not divisible by its stride {stride}"
        )
